"""Attention templates in Triton."""
