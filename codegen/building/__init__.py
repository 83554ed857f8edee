"""Builders: rendered source in, artifacts out."""
