"""Whether a tuning run repeats: plans of five seeds, raced in one interleaved run per size.

pytest benchmarks/bench_stability.py --benchmark-json out.json

Each seed searches, distils and probes by itself, in a database of its own. Plans differ by chance; what counts is
whether the slowest of them is slower than the fastest by more than the noise, which stands beside it.
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
from tilewright.tuning_db.store import Store

SIGNATURE = MoeGemmSignature(stage="up", experts=64, n=1024, k=512, top_k=6, activation="swiglu")
TUNED = (1, 8, 64)
TOKENS = (1, 4, 8, 24, 64)
"""Between the tuned sizes, too."""
SEEDS = range(5)
THREADS = usable_cores()
TRIALS = 30
BUDGET_S = 5.0


@cache
def plans() -> dict[str, Path]:
    s = SIGNATURE
    problem = f"stage=up,experts={s.experts},top_k={s.top_k},k={s.k},n={s.n},activation=swiglu"
    paths = {f"seed {seed}": database().with_name(f"stability-{seed}.db") for seed in SEEDS}
    for seed, path in zip(SEEDS, paths.values(), strict=True):
        if not path.exists():
            ensure_tuned(problem, TUNED, THREADS, trials=TRIALS, path=path, options=("--seed", str(seed)))
    return paths


def kernel_at(path: Path, tokens: int) -> str:
    with Store.open_read_only(path) as store:
        (plan,) = store.plans(signature_key=SIGNATURE.key)
        entry = plan.entry_for(tokens)
        key = entry.kernel_key if entry else None
        kernel = store.kernel(key) if key else None
    return "torch" if kernel is None else f"{kernel.template.partition('/')[2]} {kernel.key[:6]} {plan.layout}"


@cache
def run_race(tokens: int) -> Race:
    result = race_plans(SIGNATURE, tokens, plans(), threads=THREADS, budget_s=BUDGET_S)
    fastest = result.fastest(list(plans()))
    against = {name: result.ratio(name, fastest) for name in plans()}
    slowest = max(against, key=lambda name: against[name].median)
    kernels = {name: kernel_at(path, tokens) for name, path in plans().items()}
    TABLES.append(
        [
            f"{tokens} tokens: {len(set(kernels.values()))} kernels of {len(kernels)} seeds; slowest over fastest plan "
            f"{against[slowest]:.3f}, noise {result.noise:.3f}",
            *(f"  {name}  {result.results[name].median_us:8.1f} us  {kernels[name]}" for name in kernels),
        ]
    )
    return result


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.benchmark(timer=recorded_time)
def bench_stability(benchmark, tokens: int, seed: int) -> None:
    benchmark.group = f"plans of several seeds T={tokens} threads={THREADS}"
    record(benchmark, run_race(tokens), f"seed {seed}")
