"""Gating in fp32 against the best of torch's forms of the same routing, in one interleaved run per point.

pytest benchmarks/bench_gating.py --benchmark-json out.json
"""

from functools import cache

import pytest
import torch
from interleave import Race, race, record, recorded_time
from peers import limited_to, prepare_checked
from peers.gating import GROUP_PEERS, SOFTMAX_PEERS, dense, make_cases, reference
from summary import POINTS, Point
from tuned import ensure_tuned

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.runtime import Gate, ServeOptions
from tilewright.tuner.report.roofline import roofline_share

SHAPES = {"E64 k6": (64, 6, False), "E256 k8": (256, 8, False), "E256 k8 groups": (256, 8, True)}
"""Experts, top_k, and whether groups are chosen first, as DeepSeek-V3 does."""
PEERS = {name: GROUP_PEERS if grouped else SOFTMAX_PEERS for name, (_, _, grouped) in SHAPES.items()}
TOKENS = (16, 64, 256, 1024)
THREADS = tuple(dict.fromkeys((1, min(2, usable_cores()))))
OURS = "tilewright"
BUDGET_S = 3.0
CASES = 8
"""Logits of an earlier layer are in no cache that matters, but a router's own were just written: a few sets rotate."""


@cache
def plan_for(shape: str, threads: int) -> str:
    experts, top_k, grouped = SHAPES[shape]
    how = ",score=sigmoid,bias=true,groups=8,top_groups=4,scale=2.5" if grouped else ""
    return str(ensure_tuned(f"experts={experts},top_k={top_k}{how}", TOKENS, threads, op="gating"))


def our_calls(cases: list, threads: int, database: str) -> list:
    """One call per case through the runtime, as an engine makes it, into outputs that it keeps."""
    first = cases[0]
    gate = Gate.of(
        first.logits.shape[1],
        first.top_k,
        score="softmax" if first.bias is None else "sigmoid",
        bias=first.bias,
        groups=first.groups,
        top_groups=first.top_groups,
        scale=first.scale,
        options=ServeOptions(threads=threads, database=database),
    )

    def call_for(case):
        call, logits = gate.call, case.logits
        ids = torch.empty((logits.shape[0], case.top_k), dtype=torch.int32)
        weights = torch.empty(ids.shape)
        return lambda: call(logits, ids, weights)

    return [call_for(case) for case in cases]


@cache
def run_race(shape: str, tokens: int, threads: int) -> Race:
    experts, top_k, grouped = SHAPES[shape]
    database = plan_for(shape, threads)
    cases = make_cases(experts, top_k, tokens, CASES, grouped=grouped)
    contenders = prepare_checked(PEERS[shape], cases, threads, reference)
    ours = our_calls(cases, threads, database)
    for case, call in zip(cases, ours, strict=True):
        torch.testing.assert_close(dense(case, call()), reference(case), rtol=1e-5, atol=1e-6)
    with limited_to(threads):
        result = race({OURS: ours, **contenders}, control=OURS, budget_s=BUDGET_S, min_rounds=51)
    mine, best = result.results[OURS].median_us, result.fastest(list(contenders))
    POINTS.append(
        Point(
            table="gating",
            label=f"{shape} T={tokens}",
            threads=threads,
            ours_us=mine,
            best_peer=best,
            speedup=result.ratio(best, OURS),
            noise=result.noise,
            roofline_share=roofline_share(threads, 0.0, cases[0].bytes_moved, mine.median),
        )
    )
    return result


@pytest.mark.parametrize(
    ("shape", "contender"),
    [(shape, name) for shape in SHAPES for name in (OURS, *(peer.name for peer in PEERS[shape]))],
)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.benchmark(timer=recorded_time)
def bench_gating(benchmark, shape: str, threads: int, tokens: int, contender: str) -> None:
    benchmark.group = f"gating {shape} T={tokens} threads={threads}"
    record(benchmark, run_race(shape, tokens, threads), contender)
