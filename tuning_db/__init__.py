"""The database of trials, kernels and plans.

``records`` are the plain values exchanged with it, ``store`` writes and queries it, ``reader`` is the read-only
door for the runtime and needs the standard library alone.
"""
