"""Grouped GEMM in fp32 against torch, numpy, oneDNN, MKL and ggml, in one interleaved run per point.

pytest benchmarks/bench_grouped_gemm.py --benchmark-json out.json
"""

from functools import cache

import pytest
import torch
from interleave import Race, race, record, recorded_time
from peers import limited_to, prepare_checked
from peers.grouped_gemm import PEERS, GroupedGemm, make_cases, reference
from summary import POINTS, Point
from tuned import ensure_tuned

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.runtime import ServeOptions, prepare
from tilewright.tuner.report.roofline import roofline_share

SHAPES = {
    "E8 k2 1024->2048": {"experts": 8, "top_k": 2, "hidden": 1024, "inter": 2048},
    "E64 k6 512->1024": {"experts": 64, "top_k": 6, "hidden": 512, "inter": 1024},
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
TUNED_TOKENS = (1, 4, 16, 64, 256, 1024)
THREADS = tuple(dict.fromkeys((1, min(2, usable_cores()))))
OURS = "tilewright"
BUDGET_S = 4.0


@cache
def plan_for(shape: str, threads: int) -> str:
    s = SHAPES[shape]
    problem = f"experts={s['experts']},top_k={s['top_k']},k={s['hidden']},n={s['inter']}"
    return str(ensure_tuned(problem, TUNED_TOKENS, threads))


def our_calls(cases: list[GroupedGemm], top_k: int, threads: int, database: str) -> list:
    """One call per case through the runtime, as an engine makes it; weights are packed once per weight tensor."""
    prepared = {
        id(case.w): prepare(case.w, stage="up", top_k=top_k, options=ServeOptions(threads=threads, database=database))
        for case in cases
    }

    def call_for(case: GroupedGemm):
        call, out = prepared[id(case.w)].call, case.poisoned_output()
        return lambda: call(case.x, case.row_token, case.expert_offsets, out)

    return [call_for(case) for case in cases]


@cache
def run_race(shape: str, tokens: int, threads: int) -> Race:
    s = SHAPES[shape]
    database = plan_for(shape, threads)
    cases = make_cases(**s, tokens=tokens, exceed_bytes=3 * read_cpu_info().own_cache_bytes)
    contenders = prepare_checked(PEERS, cases, threads, reference)
    ours = our_calls(cases, s["top_k"], threads, database)
    for case, call in zip(cases, ours, strict=True):
        torch.testing.assert_close(call().double(), reference(case), rtol=1e-3, atol=1e-4)
    # A single call of a slow peer must not eat the whole budget.
    with limited_to(threads):
        result = race({OURS: ours, **contenders}, control=OURS, budget_s=BUDGET_S, min_rounds=11)
    best = result.fastest(list(contenders))
    mine = result.results[OURS].median_us
    POINTS.append(
        Point(
            table="grouped GEMM, 1024 tokens" if tokens == 1024 else "grouped GEMM, 1-256 tokens",
            label=f"{shape} T={tokens}",
            threads=threads,
            ours_us=mine,
            best_peer=best,
            speedup=result.ratio(best, OURS),
            noise=result.noise,
            roofline_share=roofline_share(threads, cases[0].flops, cases[0].bytes_moved, mine.median),
        )
    )
    return result


@pytest.mark.parametrize("contender", [OURS, *(peer.name for peer in PEERS)])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(timer=recorded_time)
def bench_grouped_gemm(benchmark, shape: str, threads: int, tokens: int, contender: str) -> None:
    peer = next((peer for peer in PEERS if peer.name == contender), None)
    if peer is not None and not peer.available:
        pytest.skip(peer.why_not)
    benchmark.group = f"grouped GEMM {shape} T={tokens} threads={threads}"
    record(benchmark, run_race(shape, tokens, threads), contender)
