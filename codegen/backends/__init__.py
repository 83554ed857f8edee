"""Languages that kernels are written in: one folder each, found by a template's language."""
