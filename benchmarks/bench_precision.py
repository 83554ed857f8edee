"""Each precision against our own fp32, and at few tokens against what reading and unpacking weights allow.

pytest benchmarks/bench_precision.py -o python_files=bench_*.py -s

Every contender is the fastest of ``TILEWRIGHT_BENCH_TRIALS`` variants of its precision, drawn at random with the same
seed and then raced together, interleaved, in the evaluator's worker: inputs and copies of the weights rotate beyond
the cache, whatever a precision leaves of their size. For few tokens, two bounds stand beside each time: the packed
bytes of the experts that the tokens reach at this machine's measured read bandwidth, and the same kernel on weights
that stay in the cache, which is what unpacking and multiplying take without memory.
"""

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from interleave import recorded_time
from summary import TABLES
from tuned import TRIALS

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.numbers.precisions import LOSSLESS, find_precision
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.statistics import paired_ratio
from tilewright.tuner.report.roofline import measure_roofline

OP, ARCH = find_op("moe_gemm"), native_arch()
SHAPES = {
    "E8 k2 1024->2048": MoeGemmSignature(stage="up", experts=8, n=2048, k=1024, top_k=2),
    "E64 k6 512->1024": MoeGemmSignature(stage="up", experts=64, n=1024, k=512, top_k=6),
}
_WANTED = (LOSSLESS, "bf16", "int8", "int8g128", "int8_a8", "int8g64_a8", "fp8_e4m3", "int4g128", "int4g32", "mxfp4")
PRECISIONS = tuple(
    name for name in _WANTED if all(OP.precisions(signature, ARCH)[name] is None for signature in SHAPES.values())
)
"""Those that kernels for this machine read."""
THREADS = tuple(dict.fromkeys((1, min(2, usable_cores()))))
FEW = 4
"""Tokens up to which weights are streamed; for more, each is multiplied with several rows."""
TEMPLATES = {True: "moe_gemm/cpu_stream", False: "moe_gemm/cpu_blocked"}
"""Of floats, for few tokens or more."""


@dataclass(frozen=True)
class Row:
    """One precision at one point."""

    precision: str
    time_us: float
    speedup: str
    """Over fp32, paired, with its 95 % interval."""
    read_us: float
    """The packed bytes of the experts in use at the measured bandwidth."""
    cached_us: float
    """The same kernel on few weights that stay in the cache, scaled to those in use; nan for more than few tokens."""
    error: float
    samples_us: tuple[float, ...]

    @property
    def share(self) -> float:
        """Of what the larger bound allows."""
        return max(self.cached_us, self.read_us) / self.time_us  # nan where nothing is known of the cache


def built_variants(signature: MoeGemmSignature, precision: str, tokens: int) -> list:
    few = tokens <= FEW
    configs = [
        config
        for config in OP.space(signature, ARCH, precisions=(precision,))
        if config["template"] in (TEMPLATES[few], "moe_gemm/cpu_integer")
        and (config["block_rows"] <= tokens if few else config["block_rows"] >= FEW)
    ]
    chosen = random.Random(0).sample(configs, min(TRIALS, len(configs)))
    return [b for b in VariantBuilder(OP, signature, ARCH, {"cpp": CppBuilder(ARCH)}).build(chosen) if b.path]


def cached_us(config, signature: MoeGemmSignature, threads: int) -> float:
    """Time of one row on a matrix whose 16 copies fit the last-level cache, per weight, in microseconds."""
    small = MoeGemmSignature(stage="plain", experts=1, n=256 * threads, k=signature.k)
    own = {**config, "combine": "none", "gate_up": "none", "chunk_groups": 1}
    variant_builder = VariantBuilder(OP, small, ARCH, {"cpp": CppBuilder(ARCH)})
    space = OP.space(small, ARCH, precisions=(config["precision"],))
    (built,) = variant_builder.build([space[space.index_of(own)]])
    problem = OP.problem(small, 1, RoutingSpec.parse("balanced"))
    with CpuEvaluator(OP, small, threads=threads) as evaluator:
        (evaluation,) = evaluator.evaluate([built.kernel], problem, budget_s=0.5)
    return evaluation.median_us / (small.n * small.k)


@cache
def run_point(shape: str, tokens: int, threads: int) -> list[Row]:
    signature = SHAPES[shape]
    problem = OP.problem(signature, tokens, RoutingSpec.parse("balanced"))
    active = int((np.diff(OP.inputs(problem, 0)["expert_offsets"]) > 0).sum())
    with CpuEvaluator(OP, signature, threads=threads, precisions=PRECISIONS) as evaluator:
        best = []
        for precision in PRECISIONS:
            variants = built_variants(signature, precision, tokens)
            raced = evaluator.evaluate([b.kernel for b in variants], problem, budget_s=2.0)
            timed = [(e.median_us, index) for index, e in enumerate(raced) if e.median_us]
            best.append(variants[min(timed)[1]])
        finals = evaluator.evaluate([b.kernel for b in best], problem, budget_s=6.0)
        errors = [evaluator.precision_error(problem, precision).relative for precision in PRECISIONS]
    bandwidth = measure_roofline(threads).bandwidth_gbps
    rows = []
    for precision, built, final, error in zip(PRECISIONS, best, finals, errors, strict=True):
        ratio = paired_ratio(finals[0].samples_us, final.samples_us)
        nbytes = 4 * active * signature.n * find_precision(precision).rows(signature.k)
        rows.append(
            Row(
                precision,
                final.median_us,
                f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]",
                nbytes / (bandwidth * 1e3),
                cached_us(built.variant.config, signature, threads) * active * signature.n * signature.k
                if tokens <= FEW
                else math.nan,
                error,
                final.samples_us,
            )
        )
    TABLES.append(
        [
            f"{shape}, {tokens} tokens, {threads} threads; bandwidth {bandwidth:.1f} GB/s",
            f"  {'':10} {'us':>8}  {'over our fp32':>20}  {'read us':>8} {'cached':>8} {'of bound':>8}  {'error':>7}",
            *(
                f"  {r.precision:10} {r.time_us:8.1f}  {r.speedup:>20}  {r.read_us:8.1f} {r.cached_us:8.1f}"
                f" {r.share:8.0%}  {r.error:7.4f}"
                for r in rows
            ),
        ]
    )
    return rows


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 64, 256])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(timer=recorded_time)
def bench_precision(benchmark, shape: str, threads: int, tokens: int, precision: str) -> None:
    benchmark.group = f"precision {shape} T={tokens} threads={threads}"
    row = next(row for row in run_point(shape, tokens, threads) if row.precision == precision)
    recorded_time.load(row.samples_us)
    benchmark.extra_info["speedup"] = row.speedup
    benchmark.pedantic(lambda: None, rounds=len(row.samples_us), iterations=1)
