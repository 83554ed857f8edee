"""Gating templates in C++."""
