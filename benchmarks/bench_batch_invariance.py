"""What `--batch-invariant` costs: such a plan against a free one, raced in one interleaved run per size.

pytest benchmarks/bench_batch_invariance.py --benchmark-json out.json
"""

from functools import cache
from pathlib import Path

import pytest
from interleave import Race, record, recorded_time
from planned import race_plans
from summary import TABLES
from tuned import database, ensure_tuned

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature

STAGES = {
    "up": MoeGemmSignature(stage="up", experts=64, n=1024, k=512, top_k=6, activation="swiglu"),
    "down": MoeGemmSignature(stage="down", experts=64, n=512, k=1024, top_k=6),
}
TUNED = (1, 8, 64)
TOKENS = (1, 4, 8, 24, 64)
THREADS = usable_cores()
TRIALS = 30
BUDGET_S = 4.0
FREE, INVARIANT = "free", "batch-invariant"


@cache
def plans(stage: str) -> dict[str, Path]:
    s = STAGES[stage]
    problem = f"stage={s.stage},experts={s.experts},top_k={s.top_k},k={s.k},n={s.n},activation={s.activation}"
    paths = {name: database().with_name(f"{name}-{stage}.db") for name in (FREE, INVARIANT)}
    for name, path in paths.items():
        if not path.exists():
            options = ("--batch-invariant",) if name == INVARIANT else ()
            ensure_tuned(problem, TUNED, THREADS, trials=TRIALS, path=path, options=options)
    return paths


@cache
def run_race(stage: str, tokens: int) -> Race:
    result = race_plans(STAGES[stage], tokens, plans(stage), threads=THREADS, budget_s=BUDGET_S)
    ratio = result.ratio(INVARIANT, FREE)
    TABLES.append([f"{stage} {tokens} tokens: batch-invariant over free {ratio:.3f}, noise {result.noise:.3f}"])
    return result


@pytest.mark.parametrize("plan", [FREE, INVARIANT])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.benchmark(timer=recorded_time)
def bench_batch_invariance(benchmark, stage: str, tokens: int, plan: str) -> None:
    benchmark.group = f"batch invariance {stage} T={tokens} threads={THREADS}"
    record(benchmark, run_race(stage, tokens), plan)
