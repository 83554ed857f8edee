"""Weights as kernels read them: packed, quantised, taken apart again."""
