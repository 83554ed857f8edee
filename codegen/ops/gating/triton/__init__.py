"""Gating templates in Triton."""
