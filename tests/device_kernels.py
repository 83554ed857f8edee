"""Small moe_gemm kernels in Triton, right or wrong on purpose, for tests of what measures on a device.

They are compiled once. Kernels that are to have faults of their own (tests/executing.py, ``fail``) get entries of their
own: the same binary with another name of the same length in it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_kernels import OP, SIGNATURE
from executing import ExecutingDriver

from tilewright.codegen.backends.base import BuiltFile, Source
from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.recipe.model import Argument, Guard, Launch, Recipe
from tilewright.tuner.evaluation.outcome import BuiltKernel

ARCH = GPU_ARCHS["sm_90"]
_ENTRY = "run_right"
_SOURCE = f"""
import triton
import triton.language as tl


@triton.jit
def {_ENTRY}(x, weight, offsets, out, workspace, EXPERTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    expert = 0
    for other in range(1, EXPERTS):
        expert += (tl.load(offsets + other) <= row).to(tl.int32)
    columns, steps = tl.arange(0, 32)[:, None], tl.arange(0, K)[None, :]
    there = columns < N
    products = tl.load(weight + (expert * N + columns) * K + steps, mask=there, other=0.0).to(tl.float32)
    products *= tl.load(x + row * K + steps)
    tl.store(out + row * N + tl.arange(0, 32), tl.sum(products, axis=1), mask=tl.arange(0, 32) < N)
"""
_CONSTANTS = {"EXPERTS": SIGNATURE.experts, "N": SIGNATURE.n, "K": SIGNATURE.k}
_ARGUMENTS = tuple(Argument("tensor", name) for name in ("x", "weight", "expert_offsets", "out"))
_WORKSPACE_BYTES = "rows * 4"
_ABI_AT, _FLAGS_AT = 8, 48
"""In the head of an ELF file."""
_NEWER_ABI = 8


def _entry(weight: str) -> EntrySpec:
    types = (("x", "*fp32"), ("weight", f"*{weight}"), ("offsets", "*i32"), ("out", "*fp32"), ("workspace", "*fp32"))
    return EntrySpec(_ENTRY, types, constants=_CONSTANTS)


class DeviceKernelMaker:
    """Makes kernels of ``SIGNATURE`` for an executing driver, in a folder."""

    def __init__(self, driver: ExecutingDriver, folder: Path) -> None:
        self._driver, self._folder = driver, folder
        self._images: dict[str, tuple[bytes, EntryFacts]] = {}

    def __call__(
        self,
        name: str = "right",
        *,
        weight: str = "fp32",
        rows: str = "rows",
        calls: int = 1,
        guards: tuple[Guard, ...] = (),
        workspace_bytes: str = _WORKSPACE_BYTES,
        swapped: tuple[str, Argument | None] | None = None,
        damage: bool = False,
        arch: int | None = None,
    ) -> BuiltKernel:
        """A kernel, right unless it is asked for something else.

        Args:
            name: five letters; of its entry, ``run_`` before it.
            weight: type that it takes the weights in.
            rows: expression; how many rows it computes.
            calls: how often it is launched in a call.
            guards: of its recipe.
            workspace_bytes: of its recipe.
            swapped: an argument by its name, and what is passed instead; None: nothing.
            damage: whether its binary is cut off.
            arch: that its binary says it is for.

        """
        entry = f"run_{name}"
        image, facts = self._compiled(weight)
        spec, source = _entry(weight), _SOURCE
        image, source = image.replace(_ENTRY.encode(), entry.encode()), source.replace(_ENTRY, entry)
        assert len(entry) == len(_ENTRY)
        if arch is not None:
            image = _of_another_arch(image, arch)
        if damage:
            image = bytes(64) + image[64:]
        else:
            self._driver.know(image, source, (replace(spec, entry=entry),))
        path = self._folder / f"{hashlib.sha256(image).hexdigest()[:16]}.cubin"
        path.write_bytes(image)
        arguments: tuple[Argument, ...] = (*_ARGUMENTS, Argument("workspace"))
        if swapped is not None:
            passed = (swapped[1] if each.source == swapped[0] else each for each in arguments)
            arguments = tuple(each for each in passed if each is not None)
        launch = Launch(
            artifact="made here",
            entry=entry,
            arguments=arguments,
            grid=(rows,),
            block=(str(facts.num_warps * ARCH.warp_size),),
            shared_memory_bytes=str(facts.dynamic_smem_bytes),
            hidden_arguments=2,
        )
        recipe = Recipe(
            tensors=OP.tensors(SIGNATURE),
            launches=(launch,) * calls,
            size_name=SIGNATURE.size_name,
            workspace_bytes=workspace_bytes,
            guards=guards,
            weight_layout=None if weight == "fp32" else RowLayout(weight),
        )
        key = hashlib.sha256(repr((path.name, recipe)).encode()).hexdigest()[:16]
        return BuiltKernel(key, self._folder, recipe, files=(BuiltFile(path, "cubin", facts),) * calls)

    def _compiled(self, weight: str) -> tuple[bytes, EntryFacts]:
        if weight not in self._images:
            with TritonBuilder(ARCH) as builder:
                build = builder.build(Source(_SOURCE, (_entry(weight),)))
            if build.path is None:
                pytest.fail(build.message)
            (file,) = build.files
            assert file.facts is not None
            self._images[weight] = file.path.read_bytes(), file.facts
        return self._images[weight]


def _of_another_arch(image: bytes, arch: int) -> bytes:
    """A cubin that says that it is for ``arch``, where ptxas 13 or one before it writes that."""
    shift = 8 if image[_ABI_AT] >= _NEWER_ABI else 0
    (flags,) = struct.unpack_from("<I", image, _FLAGS_AT)
    flags = flags & ~(0xFF << shift) | arch << shift
    return image[:_FLAGS_AT] + struct.pack("<I", flags) + image[_FLAGS_AT + 4 :]
