"""A small op and its C kernels for the tests of the call layer: every kind of tensor, check and argument once."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorSpec
from tilewright.runtime.calls.bind import CallVariant

COMPILER = shutil.which(os.environ.get("CC", "cc"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a test kernel with")

COLUMNS = 4
GROUPS = 3
TENSORS = (
    TensorSpec("x", "fp32", ("tokens", COLUMNS)),
    TensorSpec("scale", "fp32", (GROUPS,), role="weight"),
    TensorSpec("index", "int32", ("rows",), values="index", bound="tokens"),
    TensorSpec("offsets", "int32", (GROUPS + 1,), values="offsets", bound="rows"),
    TensorSpec("slot", "int32", ("tokens", 2), optional=True, values="slot", bound="rows"),
    TensorSpec("gain", "fp32", ("rows",), values="finite"),
    TensorSpec("out", "fp32", ("rows", COLUMNS), role="output"),
)
"""out[r] = x[index[r]] * scale[group of r] * gain[r] + (slot[index[r], 0] where there is a slot)."""

ARGUMENTS = (
    *(Argument("tensor", spec.name) for spec in TENSORS),
    Argument("size", "rows"),
    Argument("workspace"),
)

_SOURCE = r"""
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

typedef void (*fork_fn)(void (*)(void *), void *, unsigned, unsigned);
struct host { int32_t abi_version, threads; fork_fn fork; };
struct job { const int64_t *args; _Atomic int64_t next; };

static void rows(void *data) {
    struct job *job = data;
    const float *x = (const float *)job->args[0], *scale = (const float *)job->args[1];
    const int32_t *index = (const int32_t *)job->args[2], *offsets = (const int32_t *)job->args[3];
    const int32_t *slot = (const int32_t *)job->args[4];
    const float *gain = (const float *)job->args[5];
    float *out = (float *)job->args[6];
    for (int64_t r; (r = atomic_fetch_add(&job->next, 1)) < job->args[7];) {
        int group = 0;
        while (r >= offsets[group + 1]) group++;
        for (int c = 0; c < 4; c++)
            out[r * 4 + c] = x[index[r] * 4 + c] * scale[group] * gain[r] + (slot ? slot[index[r] * 2] : 0);
    }
}

int32_t compute(const struct host *host, const int64_t *args) {
    struct job job = {args, 0};
    if (host->fork) host->fork(rows, &job, (unsigned)host->threads, 0);
    else rows(&job);
    return 0;
}

int32_t fail(const struct host *host, const int64_t *args) { return 7; }

/* out = ABI version, threads, whether there is a pool, the last size argument */
int32_t report(const struct host *host, const int64_t *args) {
    float *out = (float *)args[6];
    out[0] = host->abi_version; out[1] = host->threads; out[2] = host->fork != 0; out[3] = args[9];
    return 0;
}

/* out = workspace modulo 64, its nonzero bytes, 0, 0; then dirties all of it */
int32_t use_workspace(const struct host *host, const int64_t *args) {
    float *out = (float *)args[6];
    unsigned char *workspace = (unsigned char *)args[8];
    int nonzero = 0;
    for (int64_t i = 0; i < args[9]; i++) nonzero += workspace[i] != 0;
    out[0] = args[8] % 64; out[1] = nonzero; out[2] = out[3] = 0;
    memset(workspace, 255, args[9]);
    return 0;
}

/* the first 8 bytes of out = the last size argument */
int32_t report_size(const struct host *host, const int64_t *args) {
    memcpy((void *)args[6], &args[9], 8);
    return 0;
}

int32_t nothing(const struct host *host, const int64_t *args) { return 0; }
"""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled once."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "kernels.c"), Path(folder, "kernels.so")
        source.write_text(_SOURCE)
        subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))


def variant(
    entry: str = "compute", max_size: int | None = None, *, last_size: str = "rows * 4", **properties: Any
) -> CallVariant:
    """The kernel ``entry`` for sizes up to ``max_size``; ``last_size`` is the expression of its last argument.

    ``properties`` are the recipe's.
    """
    launch = Launch("", entry, (*ARGUMENTS, Argument("size", last_size)))
    recipe = Recipe(TENSORS, (launch,), "rows", **properties)
    return CallVariant(max_size, recipe, (address_of(entry),), owner=library())


def address_of(entry: str) -> int:
    """Of a function of :func:`library`."""
    address = ctypes.cast(getattr(library(), entry), ctypes.c_void_p).value
    assert address is not None
    return address


@dataclass
class Fallback:
    """The op in torch; counts its calls."""

    scale: torch.Tensor
    calls: int = 0

    def __call__(self, x, index, offsets, slot, gain, out) -> None:
        self.calls += 1
        out.copy_(expected(x, self.scale, index, offsets, slot, gain))


def expected(x, scale, index, offsets, slot, gain) -> torch.Tensor:
    """The op by definition."""
    group = torch.repeat_interleave(torch.arange(GROUPS), offsets.diff())
    out = x[index.long()] * (scale[group] * gain)[:, None]
    return out if slot is None else out + slot[index.long(), :1]


@dataclass
class Inputs:
    """Tensors of one call, in order; ``replace`` gives the arguments with some of them changed."""

    x: torch.Tensor
    index: torch.Tensor
    offsets: torch.Tensor
    slot: torch.Tensor | None
    gain: torch.Tensor
    out: torch.Tensor

    def arguments(self, **changes: Any) -> tuple[Any, ...]:
        return tuple({**vars(self), **changes}.values())


def make_inputs(tokens: int = 5, rows: int = 9, seed: int = 0, slot: bool = True) -> Inputs:
    """Random tensors; the output is poisoned."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, rows + 1, (GROUPS - 1,), generator=generator).sort().values
    offsets = torch.cat((torch.tensor([0]), cuts, torch.tensor([rows]))).int()
    slots = torch.randint(-1, max(rows, 1), (tokens, 2), generator=generator, dtype=torch.int32).clamp(max=rows - 1)
    return Inputs(
        x=torch.randn(tokens, COLUMNS, generator=generator),
        index=torch.randint(0, tokens, (rows,), generator=generator, dtype=torch.int32),
        offsets=offsets,
        slot=slots if slot else None,
        gain=torch.randn(rows, generator=generator),
        out=torch.full((rows, COLUMNS), float("nan")),
    )
