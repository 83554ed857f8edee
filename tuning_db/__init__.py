"""The database of trials, kernels and plans."""
