"""Attention in fp32 against the best of torch's forms of it, in one interleaved run per point.

pytest benchmarks/bench_attention.py --benchmark-json out.json
"""

from functools import cache

import pytest
import torch
from interleave import Race, race, record, recorded_time
from peers import limited_to, prepare_checked
from peers.attention import DECODE_PEERS, PREFILL_PEERS, Case, make_cases
from summary import POINTS, Point
from tuned import ensure_tuned

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.ops.attention.declaration import AttentionProblem
from tilewright.codegen.ops.attention.signature import AttentionSignature, Stage
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.runtime import PagedDecode, ServeOptions, VarlenPrefill
from tilewright.tuner.report.roofline import roofline_share

SHAPES = {"32/8 x128": (32, 8, 128, 16), "32/8 x64": (32, 8, 64, 16), "32/8 x64 p128": (32, 8, 64, 128)}
"""Query heads, key/value heads, head dim, tokens of a page."""
CALLS: dict[Stage, tuple[tuple[int, int], ...]] = {
    "decode": tuple((batch, context) for batch in (1, 8) for context in (512, 2048, 8192)),
    "prefill": ((512, 512), (1024, 1024), (2048, 2048)),
}
"""Tokens of a call, and tokens of each sequence."""
PEERS = {"decode": DECODE_PEERS, "prefill": PREFILL_PEERS}
TUNED = {"decode": (1, 8), "prefill": (512, 1024, 2048)}
"""Sizes that plans are tuned at, with sequences of 2048 tokens: what serves the others was tuned for these."""
THREADS = tuple(dict.fromkeys((1, min(2, usable_cores()))))
OURS = "tilewright"
BUDGET_S = 3.0
ROTATED_BYTES = 256 << 20
"""Of keys and values, so that no call finds them in a cache."""


def our_calls(cases: list[Case], threads: int, database: str) -> list:
    """One call per case through the runtime, as an engine makes it, into an output that it keeps."""
    signature = cases[0].problem.signature
    kind = PagedDecode if signature.stage == "decode" else VarlenPrefill
    pages = {"page_size": signature.page_size} if signature.stage == "decode" else {}
    shape = signature.heads, signature.kv_heads, signature.head_dim
    made = kind.of(*shape, **pages, options=ServeOptions(threads=threads, database=database))

    def call_for(case: Case):
        call, tensors, out = made.call, case.ours, torch.empty(len(case.ours[0]), signature.heads, signature.value_dim)
        return lambda: call(*tensors, out)

    return [call_for(case) for case in cases]


@cache
def plan_for(stage: Stage, shape: str, threads: int) -> str:
    heads, kv_heads, head_dim, page_size = SHAPES[shape]
    problem = f"stage={stage},heads={heads},kv_heads={kv_heads},head_dim={head_dim},context=2048"
    problem += f",page_size={page_size}" if stage == "decode" else ""
    return str(ensure_tuned(problem, TUNED[stage], threads, op="attention"))


@cache
def run_race(stage: Stage, shape: str, call: tuple[int, int], threads: int) -> Race:
    heads, kv_heads, head_dim, page_size = SHAPES[shape]
    database = plan_for(stage, shape, threads)
    pages = {"page_size": page_size} if stage == "decode" else {}
    signature = AttentionSignature(stage=stage, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **pages)
    problem = AttentionProblem(signature, *call, RoutingSpec.parse("balanced"))
    op = find_op("attention")
    work = op.workload(problem, op.inputs(problem, 0))
    cases = make_cases(problem, min(64, -(-ROTATED_BYTES // int(work.min_bytes))) if stage == "decode" else 2)
    contenders = prepare_checked(PEERS[stage], cases, threads, lambda case: case.expected)
    ours = our_calls(cases, threads, database)
    for case, each in zip(cases, ours, strict=True):
        torch.testing.assert_close(each().double(), case.expected, rtol=1e-4, atol=1e-5)
    with limited_to(threads):
        result = race({OURS: ours, **contenders}, control=OURS, budget_s=BUDGET_S, min_rounds=11)
    mine, best = result.results[OURS].median_us, result.fastest(list(contenders))
    POINTS.append(
        Point(
            table=f"attention {stage}",
            label=f"{stage} {shape} {'x'.join(map(str, call)) if stage == 'decode' else call[0]}",
            threads=threads,
            ours_us=mine,
            best_peer=best,
            speedup=result.ratio(best, OURS),
            noise=result.noise,
            roofline_share=roofline_share(threads, work.flops, work.min_bytes, mine.median),
        )
    )
    return result


@pytest.mark.parametrize(
    ("stage", "call", "contender"),
    [
        (stage, call, name)
        for stage, calls in CALLS.items()
        for call in calls
        for name in (OURS, *(peer.name for peer in PEERS[stage]))
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.benchmark(timer=recorded_time)
def bench_attention(benchmark, stage: Stage, shape: str, threads: int, call: tuple[int, int], contender: str) -> None:
    if stage == "prefill" and shape.endswith("p128"):
        pytest.skip("a prompt has no pages")
    benchmark.group = f"attention {stage} {shape} {call} threads={threads}"
    record(benchmark, run_race(stage, shape, call, threads), contender)
