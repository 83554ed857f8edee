"""What ten times the budget would still find: both plans, raced in one interleaved run per size.

pytest benchmarks/bench_budget.py --benchmark-json out.json

The plan of `tune --trials 60` is copied and tuned on to 600 trials a size, so the second knows all that the first does.
"""

import math
import shutil
from functools import cache
from pathlib import Path

import pytest
from bench_grouped_gemm import SHAPES, our_calls
from interleave import Race, race, record, recorded_time
from peers import limited_to
from peers.grouped_gemm import make_cases
from summary import POINTS, Point
from tuned import database, ensure_tuned

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.hardware.cpu_info import read_cpu_info

SHAPE = "E64 k6 512->1024"
TOKENS = (4, 64, 256)
THREADS = usable_cores()
TRIALS = 60
SHORT, LONG = f"{TRIALS} trials", f"{10 * TRIALS} trials"
BUDGET_S = 6.0


@cache
def plans() -> dict[str, Path]:
    s = SHAPES[SHAPE]
    problem = f"experts={s['experts']},top_k={s['top_k']},k={s['hidden']},n={s['inter']}"
    short, long = (database().with_name(f"budget-{trials}.db") for trials in (TRIALS, 10 * TRIALS))
    ensure_tuned(problem, TOKENS, THREADS, trials=TRIALS, path=short)
    if not long.exists():
        shutil.copy(short, long)
    ensure_tuned(problem, TOKENS, THREADS, trials=10 * TRIALS, path=long)
    return {SHORT: short, LONG: long}


@cache
def run_race(tokens: int) -> Race:
    cases = make_cases(**SHAPES[SHAPE], tokens=tokens, exceed_bytes=3 * read_cpu_info().own_cache_bytes)
    top_k = SHAPES[SHAPE]["top_k"]
    contenders = {name: our_calls(cases, top_k, THREADS, str(path)) for name, path in plans().items()}
    with limited_to(THREADS):
        result = race(contenders, control=SHORT, budget_s=BUDGET_S, min_rounds=11)
    POINTS.append(
        Point(
            table=f"{SHORT} against {LONG}",
            label=f"{SHAPE} T={tokens}",
            threads=THREADS,
            ours_us=result.results[SHORT].median_us,
            best_peer=LONG,
            speedup=result.ratio(LONG, SHORT),
            noise=result.noise,
            roofline_share=math.nan,  # this race is about what is left to find, not about the machine
        )
    )
    return result


@pytest.mark.parametrize("plan", [SHORT, LONG])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.benchmark(timer=recorded_time)
def bench_budget(benchmark, tokens: int, plan: str) -> None:
    benchmark.group = f"{SHAPE} T={tokens} threads={THREADS}"
    record(benchmark, run_race(tokens), plan)
