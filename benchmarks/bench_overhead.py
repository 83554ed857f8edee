"""Host overhead of one call: five tensors, a preallocated output, a kernel that does nothing.

pytest benchmarks/bench_overhead.py --benchmark-json out.json

The extension and its Python twin are measured, and a Python function of no work for what the loop itself takes. The
extension also times its stages one by one (``extra_info`` in the JSON, and a line on the terminal with ``-s``).
``bench_operator``: what a graph of ``torch.compile`` or ``torch.export`` pays beside that, an operator's dispatch.
``bench_first_calls``: the first ten one-token calls of real experts in fresh processes, and what later ones take.
"""

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from summary import TABLES
from tuned import ensure_tuned

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.recipe.model import Argument, Launch, Recipe
from tilewright.codegen.routing.spec import RoutingSpec, generate_topk_ids
from tilewright.runtime import Experts
from tilewright.runtime.calls.bind import IMPLEMENTATION, CallVariant, bind_call, sort_tokens
from tilewright.runtime.serve.handles import hold

EXPERTS, HIDDEN, INTER, TOP_K = 8, 1024, 2048, 2
TOKENS = (1, 16, 256)
STAGE_REPEATS = 100_000
FIRST_EXPERTS, FIRST_HIDDEN, FIRST_INTER, FIRST_TOP_K = 64, 1024, 512, 4
PROCESSES = 7
FIRST_CALLS = """
import json, sys, time, torch
from tilewright.runtime import Experts, ServeOptions
experts, hidden, inter, top_k, threads = map(int, sys.argv[1:6])
torch.set_num_threads(threads)
up, down = torch.randn(experts, 2 * inter, hidden), torch.randn(experts, hidden, inter)
calls = [(torch.randn(1, hidden), torch.randn(1, experts)) for _ in range(40)]
layer = Experts(up, down, top_k=top_k, options=ServeOptions(max_error=0.01, database=sys.argv[6]))
assert layer.is_tuned
times_ms = []
for call in calls:
    begin = time.perf_counter_ns()
    layer(*call)
    times_ms.append((time.perf_counter_ns() - begin) / 1e6)
print(json.dumps(times_ms))
"""


@pytest.fixture(scope="module")
def idle_kernel(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ctypes.CDLL]:
    """Address of an entry that returns at once, and the library it lives in."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler to build a kernel of no work with")
    folder: Path = tmp_path_factory.mktemp("idle")
    source, built = folder / "idle.c", folder / "idle.so"
    source.write_text("#include <stdint.h>\nint32_t idle(const void *host, const int64_t *args) { return 0; }\n")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    library = ctypes.CDLL(str(built))
    address = ctypes.cast(library.idle, ctypes.c_void_p).value
    assert address is not None
    return address, library


def five_tensors(tokens: int) -> tuple[torch.Tensor, ...]:
    """x, expert_offsets, slot_row, topk_weights, out of the ``down`` stage."""
    ids = generate_topk_ids(RoutingSpec.parse("balanced"), tokens, EXPERTS, TOP_K, seed=0)
    _, offsets, slot_row = sort_tokens(torch.from_numpy(ids), EXPERTS)
    x, weights = torch.randn(tokens * TOP_K, INTER), torch.rand(tokens, TOP_K)
    return x, offsets, slot_row, weights, torch.empty(tokens, HIDDEN)


def bind_idle(idle_kernel: tuple[int, ctypes.CDLL]):
    address, library = idle_kernel
    signature = MoeGemmSignature(stage="down", experts=EXPERTS, n=HIDDEN, k=INTER, top_k=TOP_K)
    arguments = tuple(Argument("tensor", spec.name) for spec in signature.tensors())
    sizes = (Argument("size", "tokens"), Argument("size", "rows"), Argument("workspace"))
    launch = Launch("", "idle", arguments + sizes)
    recipe = Recipe(signature.tensors(), (launch,), signature.size_name, workspace_bytes="rows * 4096")
    variants = [CallVariant(bound, recipe, (address,), owner=library) for bound in (1, 4, 16, 64, 256, None)]

    def unexpected(*_) -> None:
        raise AssertionError("the kernel of no work should have been called")

    return bind_call(
        signature.tensors(),
        {"weight": torch.ones(1)},
        variants,
        size_name=signature.size_name,
        threads=1,
        fallback=unexpected,
        name="moe_gemm down",
    )


def do_nothing(x, expert_offsets, slot_row, topk_weights, out):  # noqa: ARG001 - the signature is what is measured
    return out


@pytest.mark.parametrize("implementation", ["native", "pure", "function of no work"])
@pytest.mark.parametrize("grad_mode", ["inference_mode", "grad_enabled"])
@pytest.mark.parametrize("tokens", TOKENS)
def bench_call(benchmark, idle_kernel, tokens: int, grad_mode: str, implementation: str) -> None:
    if implementation == "native" and IMPLEMENTATION != "native":
        pytest.skip("the extension was not built")
    call, tensors = bind_idle(idle_kernel), five_tensors(tokens)
    run = {"native": call, "pure": getattr(call, "twin", call), "function of no work": do_nothing}[implementation]
    benchmark.group = f"call with five tensors, T={tokens}, {grad_mode}"
    with torch.inference_mode(grad_mode == "inference_mode"):
        benchmark(run, *tensors)


@pytest.mark.skipif(IMPLEMENTATION != "native", reason="the extension was not built")
@pytest.mark.parametrize("tokens", TOKENS)
def bench_stages(benchmark, idle_kernel, tokens: int) -> None:
    """Where the time of a call goes; what the stages leave over is Python's call and return."""
    call, tensors = bind_idle(idle_kernel), five_tensors(tokens)
    benchmark.group = f"call with five tensors, T={tokens}, by stage"
    with torch.inference_mode():
        stages = call.stage_times(tensors, STAGE_REPEATS)
        benchmark(call, *tensors)
    benchmark.extra_info["stages_ns"] = stages
    print(f"\nT={tokens}: " + ", ".join(f"{name} {ns:.0f} ns" for name, ns in stages.items()))


class IdleExperts(Experts):
    """Experts that compute nothing, so that what is left is how they are called."""

    def __init__(self) -> None:
        self.handle = hold(self)

    def run(self, x, topk_ids, topk_weights, out=None):  # noqa: ARG002 - the signature is what is measured
        return torch.empty_like(x)


@pytest.mark.parametrize("way", ["direct", "operator"])
@pytest.mark.parametrize("grad_mode", ["inference_mode", "grad_enabled"])
def bench_operator(benchmark, grad_mode: str, way: str) -> None:
    """``Experts.run`` by itself, and as ``torch.ops.tilewright.routed_experts``."""
    experts, tokens = IdleExperts(), 1
    x, ids = torch.randn(tokens, HIDDEN), torch.zeros((tokens, TOP_K), dtype=torch.int64)
    weights, operator = torch.rand(tokens, TOP_K), torch.ops.tilewright.routed_experts.default
    benchmark.group = f"experts of no work, {grad_mode}"
    with torch.inference_mode(grad_mode == "inference_mode"):
        if way == "direct":
            benchmark(experts.run, x, ids, weights)
        else:
            benchmark(operator, x, ids, weights, experts.handle)


@pytest.mark.parametrize("threads", dict.fromkeys((1, min(2, usable_cores()))))
def bench_first_calls(threads: int) -> None:
    """Medians over fresh processes; the weights are bf16, and every call reads other experts."""
    sizes = f"experts={FIRST_EXPERTS},top_k={FIRST_TOP_K}"
    for stage in (
        f"stage=up,{sizes},n={FIRST_INTER},k={FIRST_HIDDEN},activation=swiglu",
        f"stage=down,{sizes},n={FIRST_HIDDEN},k={FIRST_INTER}",
    ):
        path = ensure_tuned(stage, (1,), threads, options=("--precision", "bf16"))
    arguments = [FIRST_EXPERTS, FIRST_HIDDEN, FIRST_INTER, FIRST_TOP_K, threads, path]
    command = [sys.executable, "-c", FIRST_CALLS, *map(str, arguments)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(PROCESSES)]
    first = " ".join(f"{statistics.median(run[call] for run in runs):.2f}" for call in range(10))
    slowest = max(max(run[:10]) for run in runs)
    later = statistics.median(time_ms for run in runs for time_ms in run[10:])
    TABLES.append(
        [f"first ten calls of one token, {threads} threads: {first} ms; slowest {slowest:.2f}; later ones {later:.2f}"]
    )
