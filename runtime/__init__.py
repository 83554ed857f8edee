"""Serve tuned kernels inside an inference engine."""
