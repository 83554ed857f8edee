"""Checking and measuring kernels on a GPU that is there, in a worker process with a context of its own.

The parent (``evaluator``) owns all data and judges all results; the worker (``worker``) opens the driver, keeps the
device's memory, launches stored binaries by their recipes and takes times. It needs no compiler, no Triton and no torch
with CUDA. Import what you need from the modules: this one stays empty, so that the worker starts fast.
"""
