"""Real kernels for the runtime's tests: a naive C loop that honours the ABI, stored by the real Store."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.recipe.model import ABI_VERSION, Argument, Guard, Launch, Recipe
from tilewright.tuning_db.records import ArtifactRecord, DeviceRecord, KernelRecord, PlanEntry, PlanRecord
from tilewright.tuning_db.store import Store

COMPILER = shutil.which(os.environ.get("CC", "cc"))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a test kernel with")

_SOURCE = r"""
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

typedef void (*fork_fn)(void (*)(void *), void *, unsigned, unsigned);
struct host { int32_t abi_version, threads; fork_fn fork; };

int32_t tilewright_abi_version(void) { return ABI; }
const int unique_kernel = SALT;

struct job { const int64_t *args; atomic_int next; };

static float weight_at(const float *w, int e, int row, int k) {
#if COLUMNS
    const int run = RUN ? RUN : COLUMNS, half = row / N, j = row % N;
    const int all = (N + run - 1) / run * run * HALVES, panels = (all + COLUMNS - 1) / COLUMNS;
    const int column = j / run * run * HALVES + half * run + j % run;
    return w[(((int64_t)e * panels + column / COLUMNS) * K + k) * COLUMNS + column % COLUMNS];
#else
    return w[((int64_t)e * HALVES * N + row) * K + k];
#endif
}

static float dot(const float *x, const float *w, const float *bias, int e, int row) {
    double sum = bias ? bias[e * HALVES * N + row] : 0.0;
    for (int k = 0; k < K; k++) sum += (double)x[k] * weight_at(w, e, row, k);
    return (float)sum;
}

static float output(const float *x, const float *w, const float *bias, int e, int n) {
    const float y = dot(x, w, bias, e, n);
#if ACTIVATION == 1
    return y / (1.0f + expf(-y)) * dot(x, w, bias, e, N + n);
#elif ACTIVATION == 2
    const float t = 0.7978845608f * (y + 0.044715f * y * y * y);
    return 0.5f * y * (1.0f + tanhf(t)) * dot(x, w, bias, e, N + n);
#elif ACTIVATION == 3
    const float gate = fminf(y, 7.0f), up = fmaxf(-7.0f, fminf(dot(x, w, bias, e, N + n), 7.0f));
    return gate / (1.0f + expf(-1.702f * gate)) * (up + 1.0f);
#else
    return y;
#endif
}

static void body(void *data) {
    struct job *job = data;
    const int64_t *a = job->args;
    const float *x = (const float *)a[0], *w = (const float *)a[1], *bias = (const float *)a[2];
    const int32_t *offsets = (const int32_t *)a[3];
    float *out = (float *)a[4];
#if DOWN
    const int32_t *slot_row = (const int32_t *)a[5];
    const float *scale = (const float *)a[6];
    const int64_t tokens = a[7];
    for (int t; (t = atomic_fetch_add(&job->next, 1)) < tokens;)
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int j = 0; j < TOP_K; j++) {
                const int row = slot_row[t * TOP_K + j];
                if (row < 0) continue;
                int e = 0;
                while (offsets[e + 1] <= row) e++;
                sum += scale[t * TOP_K + j] * output(x + (int64_t)row * K, w, bias, e, n);
            }
            out[(int64_t)t * N + n] = MARK * sum;
        }
#else
    const int32_t *row_token = (const int32_t *)a[5];
    for (int e; (e = atomic_fetch_add(&job->next, 1)) < EXPERTS;)
        for (int r = offsets[e]; r < offsets[e + 1]; r++)
            for (int n = 0; n < N; n++)
                out[(int64_t)r * N + n] = MARK * output(x + (int64_t)(row_token ? row_token[r] : r) * K, w, bias, e, n);
#endif
}

int32_t naive(const struct host *host, const int64_t *args) {
    struct job job = {args, 0};
    if (FAIL) return 7;
    const int64_t size = args[SIZE_ARGUMENT];
    if (SLOW_FROM <= size && size <= SLOW_TO) usleep(20000);
    if (host->fork) host->fork(body, &job, (unsigned)host->threads, 0);
    else body(&job);
    return 0;
}
"""

_ACTIVATIONS = {"none": 0, "swiglu": 1, "geglu": 2, "swiglu_clamped": 3}


@dataclass(frozen=True)
class Built:
    """A compiled kernel, ready to be stored or tampered with."""

    record: KernelRecord
    artifact: ArtifactRecord
    layout_key: str = ""
    """Of its weights, whatever its recipe may say by now."""


def build(
    signature: MoeGemmSignature,
    *,
    layout: WeightLayout | None = None,
    mark: float = 1.0,
    abi: int = ABI_VERSION,
    salt: int = 0,
    fail: bool = False,
    slow_sizes: tuple[int, int] = (1, 0),
    guards: tuple[Guard, ...] = (),
) -> Built:
    """A correct kernel whose results are multiplied by ``mark``, so that a test sees who computed them.

    From the first to the last of ``slow_sizes`` it takes 20 ms longer.
    """
    names = ["x", "weight", "bias" if signature.bias else "", "expert_offsets", "out"]
    names += {"up": ["row_token"], "down": ["slot_row", "topk_weights"], "plain": [""]}[signature.stage]
    data = _compile(
        {
            "EXPERTS": signature.experts,
            "N": signature.n,
            "K": signature.k,
            "TOP_K": signature.top_k,
            "HALVES": signature.halves,
            "ACTIVATION": _ACTIVATIONS[signature.activation],
            "DOWN": int(signature.stage == "down"),
            "COLUMNS": layout.columns if layout else 0,
            "RUN": layout.run if layout else 0,
            "MARK": mark,
            "ABI": abi,
            "SALT": salt,
            "FAIL": int(fail),
            "SLOW_FROM": slow_sizes[0],
            "SLOW_TO": slow_sizes[1],
            "SIZE_ARGUMENT": len(names),
        }
    )
    artifact = ArtifactRecord.from_bytes(data, kind="host_so", abi_version=abi)
    arguments = [Argument("tensor", name) if name else Argument("size", "0") for name in names]
    recipe = Recipe(
        tensors=signature.tensors(),
        launches=(Launch(artifact.checksum, "naive", (*arguments, Argument("size", signature.size_name))),),
        size_name=signature.size_name,
        guards=guards,
        weight_layout=layout,
    )
    record = KernelRecord(
        key=f"{artifact.checksum[:32]}{signature.key}",
        op=signature.op,
        signature_key=signature.key,
        signature=signature.to_dict(),
        template="moe_gemm/naive",
        config={"mark": mark},
        arch=native_arch().name,
        source=_SOURCE,
        recipe=recipe.to_dict(),
        toolchain="cc",
        facts={},
        artifacts=(artifact.checksum,),
        checked="device",
    )
    return Built(record, artifact, layout.key if layout else "")


def store_plan(
    path: Path,
    signature: MoeGemmSignature,
    entries: Sequence[tuple[int | None, Built | None]],
    *,
    device_key: str | None = None,
    threads: int = 2,
    copies: bool = False,
) -> Path:
    """Write a plan with its kernels into the database ``path`` and return ``path``.

    It names the layout of the first kernel, or with ``copies`` those of all.
    """
    device_key = device_key or read_cpu_info().key
    with Store.open(path) as store:
        store.put_device(DeviceRecord(device_key, "test", native_arch().name))
        for _, built in entries:
            if built is not None:
                store.add_kernel(built.record, [built.artifact])
        layouts = [built.layout_key for _, built in entries if built is not None]
        store.put_plan(
            PlanRecord(
                op=signature.op,
                signature_key=signature.key,
                signature=signature.to_dict(),
                device_key=device_key,
                threads=threads,
                layout="+".join(dict.fromkeys(layouts if copies else layouts[:1])),
                timing="measured",
                checked="device",
                precision="fp32",
                entries=tuple(PlanEntry(bound, built and built.record.key, 12.5, 25.0, 8) for bound, built in entries),
                model="test-model",
            )
        )
    return path


def on_other_arch(built: Built, arch: str) -> Built:
    """The same kernel, said to be built for ``arch``."""
    return replace(built, record=replace(built.record, arch=arch, key=f"{arch}{built.record.key}"))


@functools.cache
def _compile_cached(defines: tuple[tuple[str, float], ...]) -> bytes:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "naive.c"), Path(directory, "naive.so")
        source.write_text(_SOURCE)
        flags = [f"-D{name}={value}" for name, value in defines]
        command = [COMPILER, "-O1", "-shared", "-fPIC", *flags, "-o", str(library), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        return library.read_bytes()


def _compile(defines: dict[str, float]) -> bytes:
    return _compile_cached(tuple(defines.items()))
