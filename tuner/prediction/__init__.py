"""Times predicted from what kernels have to do and what their binaries take."""
