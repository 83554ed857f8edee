"""Builders of GPU kernels that all tests of a run share: one server that has Triton loaded, and one cache."""

import atexit
import functools

from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.backends.triton.pool import CompilePool
from tilewright.codegen.hardware.archs import GPU_ARCHS


@functools.cache
def gpu_builder(arch_name: str) -> TritonBuilder:
    """The builder for an arch; it lives as long as this process."""
    made = TritonBuilder(GPU_ARCHS[arch_name])
    made._pool = _pool()
    return made


@functools.cache
def _pool() -> CompilePool:
    made = CompilePool()
    atexit.register(made.close)
    return made
