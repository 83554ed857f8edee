"""Host overhead of one call: five tensors, a preallocated output, a kernel that does nothing.

pytest benchmarks/bench_overhead.py --benchmark-json out.json

The extension and its Python twin are measured, and a Python function of no work for what the loop itself takes. The
extension also times its stages one by one (``extra_info`` in the JSON, and a line on the terminal with ``-s``).
``bench_device_stages``: the same of a call on a CUDA device, up to a driver that does nothing; no GPU is needed.
``bench_device_load``: from a database to a function on such a device, up to the same driver.
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
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from summary import TABLES
from tuned import ensure_tuned

from tilewright.codegen.backends.binaries.cubin import read_cubin
from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorMap
from tilewright.codegen.routing.spec import RoutingSpec, generate_topk_ids
from tilewright.runtime import Experts
from tilewright.runtime.calls.bind import (
    IMPLEMENTATION,
    CallVariant,
    DeviceVariant,
    bind_call,
    bind_device_call,
    sort_tokens,
)
from tilewright.runtime.calls.exchange import ExchangeTable, exchange_table
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.launchers.cuda import launcher
from tilewright.runtime.launchers.cuda.driver import Driver
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs
from tilewright.runtime.serve.handles import hold
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.store import Store

EXPERTS, HIDDEN, INTER, TOP_K = 8, 1024, 2048, 2
TOKENS = (1, 16, 256)
STAGE_REPEATS = 100_000
LOADS = 200
EXCHANGE, IDLE_STREAM = b"dlpack_exchange_api", 0x5EED0
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


@pytest.fixture(scope="module")
def idle_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A driver of no work, while torch's tensors on the CPU pass for such on its one device."""
    compiler, native, table = shutil.which(os.environ.get("CC", "cc")), native_for_torch(), exchange_table(torch.Tensor)
    if compiler is None or native is None or table is None:
        pytest.skip("no C compiler, or no extension")
    built = tmp_path_factory.mktemp("idle") / "libcuda.so.1"
    source = Path(__file__).parent / "idle_driver.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built), "-ldl"], check=True)
    library = ctypes.CDLL(str(built))
    ctypes.c_void_p.in_dll(library, "idle_read_of_torch").value = table.dltensor_from_py_object_no_sync
    posing = ExchangeTable.from_buffer_copy(table)
    posing.previous = None
    posing.dltensor_from_py_object_no_sync = ctypes.cast(library.idle_read, ctypes.c_void_p).value
    posing.current_work_stream = ctypes.cast(library.idle_stream, ctypes.c_void_p).value
    make_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = make_capsule(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(posing), EXCHANGE, None)
    native.setup_torch(torch.Tensor, torch.nn.Parameter, capsule, torch.is_grad_enabled)
    yield Driver(str(built))
    native.setup_torch(torch.Tensor, torch.nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__, torch.is_grad_enabled)


def expect_parameters(driver: Driver, sizes: Sequence[int]) -> None:
    """Of every function that the driver of no work gives from now on, in bytes."""
    library = ctypes.CDLL(driver.path)
    ctypes.c_int.in_dll(library, "idle_parameters").value = len(sizes)
    for index, size in enumerate(sizes):
        (ctypes.c_int * 64).in_dll(library, "idle_sizes")[index] = size


def bind_on_device(driver: Driver, *, mapped: bool):
    signature = MoeGemmSignature(stage="down", experts=EXPERTS, n=HIDDEN, k=INTER, top_k=TOP_K)
    maps = {
        "x": TensorMap(("rows", str(INTER)), 4, box=(64, 32), data_type=7, swizzle=3),
        "weight": TensorMap((str(EXPERTS * HIDDEN), str(INTER)), 4, box=(64, 32), data_type=7, swizzle=3),
    }
    arguments = tuple(
        Argument("tensor", spec.name, map=maps.get(spec.name) if mapped else None) for spec in signature.tensors()
    )
    sizes = (Argument("size", "tokens"), Argument("size", "rows"), Argument("workspace"))
    grid, block = ("ceildiv(rows, 64) * 8",), ("128",)
    launch = Launch("", "idle", arguments + sizes, grid, block, shared_memory_bytes="98304", hidden_arguments=2)
    recipe = Recipe(signature.tensors(), (launch,), signature.size_name, workspace_bytes="rows * 4096")
    parameters = [size for argument in launch.arguments for size in ([128, 4, 4, 8, 8] if argument.map else [8])]
    expect_parameters(driver, (*parameters, 8, 8))
    device = driver.device(0)
    kernel = CudaKernel(driver, device, b"", "idle", Needs(98304))
    variants = [DeviceVariant(bound, recipe, (kernel,)) for bound in (1, 4, 16, 64, 256, None)]
    call = bind_device_call(
        signature.tensors(),
        {"weight": 1 << 40},
        variants,
        size_name=signature.size_name,
        device=device,
        driver=driver,
        fallback=lambda *_: None,
        name="moe_gemm down",
    )
    # As the first call on a stream does, whose memory the twin makes.
    call.binding.workspaces.make(0, IDLE_STREAM, 4 << 20, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    return call


@pytest.mark.parametrize("mapped", [False, True], ids=["pointers", "two tensor maps"])
@pytest.mark.parametrize("grad_mode", ["inference_mode", "grad_enabled"])
def bench_device_stages(benchmark, idle_driver: Driver, grad_mode: str, mapped: bool) -> None:
    """Where the time of a call on a device goes; ``driver`` is what a driver of no work takes."""
    call, tensors = bind_on_device(idle_driver, mapped=mapped), five_tensors(16)
    benchmark.group = f"call on a device with five tensors, {grad_mode}, by stage"
    with torch.inference_mode(grad_mode == "inference_mode"):
        stages = call.stage_times(tensors, STAGE_REPEATS)
        benchmark(call, *tensors)
    benchmark.extra_info["stages_ns"] = stages
    print(f"\n{grad_mode}: " + ", ".join(f"{name} {ns:.0f} ns" for name, ns in stages.items()))


def bench_device_load(idle_driver: Driver, tmp_path: Path) -> None:
    """From a database to a function that can be launched, the reader open and the kernel's bytes not yet read."""
    arch, op = GPU_ARCHS["sm_90"], find_op("moe_gemm")
    signature = MoeGemmSignature(stage="down", experts=EXPERTS, n=HIDDEN, k=INTER, top_k=TOP_K, x_dtype="bf16")
    with TritonBuilder(arch, tmp_path / "builds") as builder:
        variants = VariantBuilder(op, signature, arch, {"triton": builder})
        (built,) = variants.build([op.default_config(signature, arch)])
        record, artifacts = variants.record(built, "compiled")
    path = tmp_path / "kernels.db"
    with Store.open(path) as store:
        store.add_kernel(record, artifacts)
    expect_parameters(idle_driver, read_cubin(artifacts[0].data, record.recipe["launches"][0]["entry"]).parameter_bytes)
    reader, device, launching = Reader.open(path), idle_driver.device(0), launcher.CudaLauncher()
    steps = []
    for _ in range(LOADS):
        launcher._cubins.clear()  # noqa: SLF001 - what a process does once is to be done again
        launcher._kernels.clear()  # noqa: SLF001
        times_ms = [time.thread_time_ns() / 1e6]
        stored = reader.kernel(record.key)
        images = {checksum: reader.artifact(checksum) for checksum in stored.artifacts}
        times_ms.append(time.thread_time_ns() / 1e6)
        recipe = Recipe.from_dict(stored.recipe)
        launching.require(recipe)
        times_ms.append(time.thread_time_ns() / 1e6)
        cubins = {checksum: launching.load(checksum, partial(images.get, checksum, b"")) for checksum in images}
        launcher.load_kernels(recipe, cubins, idle_driver, device, toolchain=stored.toolchain)
        times_ms.append(time.thread_time_ns() / 1e6)
        steps.append([after - before for before, after in pairwise(times_ms)])
    kib = sum(len(each.data) for each in artifacts) >> 10
    read, decoded, loaded = (statistics.median(step) for step in zip(*steps, strict=True))
    TABLES.append(
        [
            f"a stored kernel of {kib} KiB, {len(recipe.launches)} launches, ms of CPU time up to the driver: "
            f"{read:.2f} to read it, {decoded:.2f} for its recipe, {loaded:.2f} to load it"
        ]
    )


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
