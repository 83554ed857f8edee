"""Small moe_gemm kernels in C, right or wrong on purpose, for the evaluator's tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.declaration import MoeGemm
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.recipe.model import ABI_VERSION, Argument, Guard, Launch, Recipe
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel

COMPILER = shutil.which(os.environ.get("CC", "cc"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a test kernel with")

OP = MoeGemm()
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=24, k=16)

_SOURCE = r"""
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct host { int32_t abi_version, threads; void (*fork)(void (*)(void *), void *, unsigned, unsigned); };

int32_t tilewright_abi_version(void) { return ABI; }

__attribute__((constructor)) static void load(void) { ON_LOAD }

struct job { const int64_t *a; int threads, next; };

static void body(void *data) {
    struct job *job = data;
    const float *x = (const float *)job->a[0], *w = (const float *)job->a[1];
    const int32_t *offsets = (const int32_t *)job->a[2];
    float *out = (float *)job->a[3];
    for (int e; (e = __sync_fetch_and_add(&job->next, 1)) < EXPERTS;)
        for (int64_t r = offsets[e]; r < offsets[e + 1]; r++)
            for (int n = 0; n < N; n++) {
                float sum = 0;
                for (int k = 0; k < K; k++) sum += x[r * K + k] * w[WEIGHT_INDEX];
                out[r * N + n] = sum;
            }
}

int32_t run(const struct host *host, const int64_t *a) {
    static int64_t calls;
    calls++;
    const int64_t rows = a[4], size = rows * N;
    float *out = (float *)a[3], *workspace = (float *)a[5];
    (void)calls, (void)size, (void)workspace;
    BEFORE
    struct job job = {a, host->threads, 0};
    if (host->fork) host->fork(body, &job, host->threads, 0);
    else body(&job);
    AFTER
    return 0;
}
"""


class KernelMaker:
    """Compiles kernels of ``SIGNATURE`` into a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(
        self,
        before: str = "",
        after: str = "",
        *,
        on_load: str = "",
        abi: int = ABI_VERSION,
        entry: str = "run",
        columns: int = 0,
        workspace_bytes: str = "0",
        workspace_zeroed: bool = False,
        guards: tuple[Guard, ...] = (),
    ) -> BuiltKernel:
        """Kernel that runs C code before and after its work; ``rows``, ``size``, ``out`` and ``calls`` are in scope."""
        index = "(e * N + n) * K + k"
        if columns:
            index = f"((e * {-(-SIGNATURE.n // columns)} + n / {columns}) * K + k) * {columns} + n % {columns}"
        names = {"ABI": abi, "EXPERTS": SIGNATURE.experts, "N": SIGNATURE.n, "K": SIGNATURE.k, "WEIGHT_INDEX": index}
        names |= {"BEFORE": before, "AFTER": after, "ON_LOAD": on_load}
        defines = "".join(f"#define {name} {value}\n" for name, value in names.items())
        digest = hashlib.sha256((defines + entry + workspace_bytes).encode()).hexdigest()[:16]
        path = self._directory / f"{digest}.so"
        if not path.exists():
            assert COMPILER is not None
            subprocess.run(
                [COMPILER, "-O1", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path), "-lm"],
                input=defines + _SOURCE,
                text=True,
                check=True,
            )
        arguments = (*(Argument("tensor", name) for name in ("x", "weight", "expert_offsets", "out")),)
        recipe = Recipe(
            tensors=OP.tensors(SIGNATURE),
            launches=(Launch("", entry, (*arguments, Argument("size", "rows"), Argument("workspace"))),),
            size_name=SIGNATURE.size_name,
            workspace_bytes=workspace_bytes,
            workspace_zeroed=workspace_zeroed,
            guards=guards,
            weight_layout=WeightLayout(columns) if columns else None,
        )
        return BuiltKernel(digest, path, recipe)


def problem(rows: int = 16) -> MoeGemmProblem:
    """Problem to measure: an even size, unlike all awkward ones of this signature."""
    return OP.problem(SIGNATURE, rows, RoutingSpec.parse("balanced"))


@contextmanager
def evaluator(time_limit_s: float = 5.0, memory_limit_bytes: int = 128 << 20) -> Iterator[CpuEvaluator]:
    """Evaluator of ``SIGNATURE`` with two threads."""
    with CpuEvaluator(
        OP,
        SIGNATURE,
        threads=2,
        seed=1,
        time_limit_s=time_limit_s,
        memory_limit_bytes=memory_limit_bytes,
    ) as made:
        yield made
