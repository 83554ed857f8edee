"""Calls of built kernels in this process: every buffer guarded, poisoned and compared afterwards."""

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.host import Host
from tilewright.codegen.recipe.model import ABI_VERSION, Recipe
from tilewright.codegen.recipe.resolve import Place, resolve, workspace_bytes
from tilewright.runtime.weights.packing import pack_array, packed_shape

POISON = 0xFF  # NaN as a float, -1 as an index
GUARD_BYTES = 4096
DTYPES = {"fp32": np.dtype(np.float32), "int32": np.dtype(np.int32)}

BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
FORK = ctypes.CFUNCTYPE(None, BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def forking(started: int) -> Any:
    """A fork that starts ``started`` threads, however many are asked for; keep it referenced while it is in use."""

    def fork(body: Any, data: int, _threads: int, _flags: int) -> None:
        others = [threading.Thread(target=body, args=(data,)) for _ in range(started - 1)]
        for other in others:
            other.start()
        body(data)
        for other in others:
            other.join()

    return FORK(fork)


@dataclass(frozen=True)
class Call:
    """How a kernel is called: threads that the host claims to have, and the function that starts them."""

    name: str
    threads: int
    fork: Any = None
    """None, an address, or what :func:`forking` made."""

    @property
    def fork_address(self) -> int | None:
        return None if self.fork is None else ctypes.cast(self.fork, ctypes.c_void_p).value


class Guarded:
    """``nbytes`` between guards, ``skew`` bytes past a 64-byte boundary; poisoned until they are filled."""

    def __init__(self, nbytes: int, skew: int = 0) -> None:
        self._all = np.full(nbytes + 2 * GUARD_BYTES + 64, POISON, np.uint8)
        start = GUARD_BYTES + (skew - self._all.ctypes.data - GUARD_BYTES) % 64
        self.bytes = self._all[start : start + nbytes]

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data

    def touched(self) -> bool:
        """Whether anything beside the bytes themselves was written."""
        inside = self.bytes.ctypes.data - self._all.ctypes.data
        before, after = self._all[:inside], self._all[inside + self.bytes.size :]
        return bool((before != POISON).any() or (after != POISON).any())


def pack(weight: NDArray[Any], layout: WeightLayout) -> NDArray[np.float32]:
    """Weights [experts, n, k] in panels, one column at a time as :class:`WeightLayout` says it."""
    experts, n, k = weight.shape
    per_half, run = n // layout.halves, layout.run or layout.columns
    packed = np.zeros((experts, layout.panels(n), k, layout.columns), np.float32)
    for half in range(layout.halves):
        for column in range(per_half):
            at = (column // run * layout.halves + half) * run + column % run
            packed[:, at // layout.columns, :, at % layout.columns] = weight[:, half * per_half + column]
    return packed


def tensors_for(recipe: Recipe, weights: Arrays, inputs: Arrays) -> Arrays:
    """What a kernel is given: inputs, and weights in its layout."""
    tensors = {**weights, **inputs}
    layout = recipe.weight_layout
    if layout is not None and layout.stored.quantised:
        weight = tensors["weight"]
        words = np.empty(packed_shape(layout, weight.shape), np.int32)
        pack_array(weight, layout, words, threads=1)
        tensors["weight"] = words.view(np.float32)
    elif layout is not None:
        tensors["weight"] = pack(tensors["weight"], layout)
    return tensors


def sizes_of(recipe: Recipe, inputs: Arrays, expected: Arrays) -> dict[str, int]:
    """Dynamic sizes of a call."""
    sizes: dict[str, int] = {}
    for spec in recipe.tensors:
        if spec.role != "weight" and (spec.role == "output" or spec.name in inputs):
            shape = (expected if spec.role == "output" else inputs)[spec.name].shape
            sizes |= {dim: size for dim, size in zip(spec.dims, shape, strict=True) if isinstance(dim, str)}
    return sizes


def run_kernel(path: Path, recipe: Recipe, tensors: Arrays, expected: Arrays, call: Call) -> Arrays:
    """Outputs of one call, shaped like ``expected``; fails when the kernel wrote to anything else but its workspace."""
    library = ctypes.CDLL(str(path))
    assert library.tilewright_abi_version() == recipe.abi_version == ABI_VERSION
    sizes, place = sizes_of(recipe, tensors, expected), Place(threads=call.threads)
    workspace = Guarded(workspace_bytes(recipe, sizes, place))
    if recipe.workspace_zeroed:
        workspace.bytes[:] = 0
    buffers: dict[str, Guarded] = {}
    for spec in recipe.tensors:
        if spec.role == "output":
            buffers[spec.name] = Guarded(expected[spec.name].size * DTYPES[spec.dtype].itemsize, skew=4)
        elif spec.name in tensors:
            array = np.ascontiguousarray(tensors[spec.name], DTYPES[spec.dtype])
            # Packed weights are aligned; all else need not be aligned to more than its elements.
            buffer = Guarded(array.nbytes, skew=0 if spec.name == "weight" else 4)
            buffer.bytes[:] = array.reshape(-1).view(np.uint8)
            buffers[spec.name] = buffer
    before = {name: buffers[name].bytes.tobytes() for name in buffers.keys() & tensors.keys()}
    addresses = {name: buffer.address for name, buffer in buffers.items()} | {"workspace": workspace.address}
    resolved = resolve(recipe, sizes, addresses, place)
    assert not resolved.refusals
    host = Host(ABI_VERSION, call.threads, call.fork_address)
    for launch in resolved.launches:
        values = [argument.value for argument in launch.arguments]
        assert getattr(library, launch.entry)(ctypes.byref(host), (ctypes.c_int64 * len(values))(*values)) == 0
    assert not workspace.touched(), f"{call.name}: wrote past {recipe.workspace_bytes} bytes of workspace"
    for name, buffer in buffers.items():
        assert not buffer.touched(), f"{call.name}: wrote beside {name}"
        assert name not in before or buffer.bytes.tobytes() == before[name], f"{call.name}: changed its input {name}"
    return {
        spec.name: buffers[spec.name].bytes.view(DTYPES[spec.dtype]).reshape(expected[spec.name].shape)
        for spec in recipe.tensors
        if spec.role == "output"
    }
