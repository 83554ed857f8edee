"""Triton's own launcher on the stand-in of the CUDA driver, as a second opinion on what a launch has to pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cuda_standin import StandIn

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.recipe.resolve import ResolvedArgument, ResolvedLaunch


class _Address:
    """A tensor of which nothing but its address is known."""

    shape, strides, dtype = (), (), None

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


@contextmanager
def active(standin: StandIn, folder: Path) -> Iterator[None]:
    """Triton's driver for CUDA, compiled against the stand-in."""
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as triton_driver

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        patch.setattr(knobs.nvidia, "libcuda_path", str(standin.path.parent), raising=False)
        nvidia.library_dirs.cache_clear()
        nvidia.libcuda_dirs.cache_clear()
        made = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
        made.utils, made.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        patch.setattr(triton_driver, "_active", made)  # to reset it would ask for a device
        try:
            yield
        finally:
            nvidia.library_dirs.cache_clear()
            nvidia.libcuda_dirs.cache_clear()


def launch_as_triton_does(source: Path, spec: EntrySpec, arch: GpuArch, launch: ResolvedLaunch, stream: int) -> None:
    """Compile the entry of ``source`` and launch it with the arguments of ``launch``; a context must be current."""
    from triton import compile as compile_entry
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import driver as triton_driver

    found = importlib.util.spec_from_file_location("launched_kernel", source)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    function = getattr(module, spec.entry)
    names = function.arg_names
    signature = dict(spec.arguments) | dict.fromkeys(spec.constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible_by_16}
    ast = ASTSource(function, signature, constexprs=dict(spec.constants), attrs=aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = compile_entry(ast, target=GPUTarget(*arch.triton_target), options=options)
    metadata = compiled.metadata
    utils = triton_driver.active.utils
    _, loaded, *_ = utils.load_binary(metadata.name, compiled.asm["cubin"], metadata.shared, 0)
    passed: dict[str, Any] = dict(spec.constants)
    for (name, kind), argument in zip(spec.arguments, launch.arguments, strict=True):
        passed[name] = _as_triton_takes(kind, argument)
    launcher = triton_driver.active.launcher_cls(ast, metadata)
    assert launch.grid is not None
    x, y, z = launch.grid
    packed = (metadata.num_warps, metadata.num_ctas, metadata.shared)
    launcher(x // metadata.num_ctas, y, z, stream, loaded, packed, None, None, None, *(passed[n] for n in names))


def _as_triton_takes(kind: str, argument: ResolvedArgument) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if argument.map is None:
        return _Address(argument.value) if kind.startswith("*") else argument.value
    made = TensorDescriptor.__new__(TensorDescriptor)  # its checks ask for a tensor
    made.base = _Address(argument.value)
    made.shape, made.strides = list(argument.map.shape), list(argument.map.strides)
    made.block_shape = list(argument.map.encoding.box)
    made.padding, made.round_f32_to_tf32 = "zero", False
    return made
