"""Kernels measured on this machine's CPU, in a process that they may ruin."""
