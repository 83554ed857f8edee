"""Grouped GEMM templates in Triton."""
