"""Grouped GEMM over experts: stages up, down and plain."""
