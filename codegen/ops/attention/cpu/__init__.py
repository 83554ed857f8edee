"""Attention templates in C++."""
