"""Checking and measuring kernels on this machine's CPU, in a worker process that a kernel may ruin.

The parent (``evaluator``) owns all data and judges all results; the worker (``worker``) only maps memory that the
parent gives it, loads kernels, calls them and takes times. Import what you need from the modules: this one stays empty,
so that the worker starts in milliseconds.
"""
