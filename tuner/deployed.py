"""What a plan brings where it is deployed: the runtime's calls raced against plain torch, in a process of their own.

Run as ``python -m tilewright.tuner.deployed``; the request comes on stdin and the answer goes to stdout, both JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.codegen.ops import find_op
from tilewright.codegen.ops.base import Problem
from tilewright.tuner.evaluation.statistics import paired_ratio

_ROUNDS = 25
_LIMIT_S = 300


@dataclass(frozen=True)
class Deployed:
    """One problem, as an engine would see it: medians of interleaved calls from Python."""

    tokens: int
    torch_us: float
    tilewright_us: float
    speedup: float
    """Median of paired ratios, with its 95 % interval."""
    speedup_low: float
    speedup_high: float
    rounds: int


def race_against_torch(
    problems: Sequence[Problem], *, database: str, threads: int, seed: int, budget_s: float, max_error: float = 0.0
) -> list[Deployed]:
    """Race the runtime with ``database`` against plain torch on problems of one signature; [] when it could not run."""
    request = {
        "op": problems[0].signature.op,
        "problems": [problem.to_dict() for problem in problems],
        "database": database,
        "threads": threads,
        "seed": seed,
        "budget_s": budget_s,
        "max_error": max_error,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tilewright.tuner.deployed"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S + budget_s,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or "").strip().splitlines()[-1:] if isinstance(error.stderr, str) else []
        print(f"tune: the deployed plan could not be raced against torch: {' '.join(said) or error}", file=sys.stderr)
        return []
    return [Deployed(**row) for row in json.loads(done.stdout)]


def _answer(request: dict[str, Any]) -> list[Deployed]:
    import torch

    from tilewright.runtime import prepare

    torch.set_num_threads(request["threads"])
    op = find_op(request["op"])
    problems = [op.problem_from_dict(fields) for fields in request["problems"]]
    signature = problems[0].signature
    weights = {name: torch.from_numpy(array) for name, array in op.weights(signature, request["seed"]).items()}
    options = {
        "stage": signature.stage,
        "top_k": signature.top_k,
        "activation": signature.activation,
        "bias": weights.get("bias"),
        "threads": request["threads"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the torch side has no database on purpose
        plain = prepare(weights["weight"], database="/dev/null/no-database", **options)
    tuned = prepare(weights["weight"], database=request["database"], max_error=request["max_error"], **options)
    return [
        _race(op, problem, tuned, plain, request["seed"], request["budget_s"] / len(problems)) for problem in problems
    ]


def _race(
    op: Any, problem: Problem, tuned: Callable[..., Any], plain: Callable[..., Any], seed: int, budget_s: float
) -> Deployed:
    """Alternate the two, on several routings so that weights do not stay in the cache."""
    import torch

    calls = []
    for routing_seed in range(seed, seed + 4):
        inputs = {name: torch.from_numpy(array) for name, array in op.inputs(problem, routing_seed).items()}
        specs = [spec for spec in op.tensors(problem.signature) if spec.role != "weight"]
        sizes = {"tokens": problem.dynamic_size, "rows": int(inputs["expert_offsets"][-1])}
        out = torch.empty([sizes.get(dim, dim) for dim in specs[-1].dims])
        calls.append([inputs[spec.name] for spec in specs[:-1]] + [out])
    times: dict[str, list[float]] = {"tuned": [], "plain": []}
    deadline = time.perf_counter() + budget_s
    for round_ in range(-2, _ROUNDS):
        for name, call in (("tuned", tuned), ("plain", plain)):
            begin = time.perf_counter_ns()
            call(*calls[round_ % len(calls)])
            if round_ >= 0:
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
        if round_ >= 5 and time.perf_counter() > deadline:
            break
    speedup = paired_ratio(times["plain"], times["tuned"])
    middle = {name: sorted(samples)[len(samples) // 2] for name, samples in times.items()}
    return Deployed(
        tokens=problem.dynamic_size,
        torch_us=middle["plain"],
        tilewright_us=middle["tuned"],
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        rounds=speedup.pairs,
    )


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in _answer(json.load(sys.stdin))]))
