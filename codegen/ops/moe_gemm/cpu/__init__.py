"""Grouped GEMM templates in C++."""
