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

import numpy as np

from tilewright.codegen.ops import find_op
from tilewright.codegen.ops.base import Problem
from tilewright.tuner.evaluation.binding import DTYPES, outputs_of, shape_of, sizes_of
from tilewright.tuner.evaluation.statistics import Interval, median_interval, paired_ratio

_ROUNDS = 25
_LIMIT_S = 300


@dataclass(frozen=True)
class Deployed:
    """One problem, as an engine would see it: interleaved calls from Python."""

    tokens: int
    torch: Interval
    """Of plain torch's times in us."""
    served: Interval
    """Of the times in us of what the runtime serves."""
    speedup: float
    """Median of paired ratios, with its 95 % interval."""
    speedup_low: float
    speedup_high: float
    rounds: int
    """Samples of either."""
    error: float
    """Largest difference between the two results, relative to the largest of torch's."""

    def document(self) -> dict[str, Any]:
        """As JSON, with the samples, intervals and error of what was measured."""
        return {
            "torch": self._timed(self.torch, None),
            "served": self._timed(self.served, self.error),
            "speedup": {"median": self.speedup, "low": self.speedup_low, "high": self.speedup_high},
        }

    def _timed(self, times: Interval, error: float | None) -> dict[str, Any]:
        return {
            "median_us": times.median,
            "low_us": times.low,
            "high_us": times.high,
            "samples": self.rounds,
            "error_against_torch": error,
        }

    @property
    def slower_than_torch(self) -> bool:
        """Whether torch is faster, beyond the noise."""
        return self.speedup_high < 1


def race_against_torch(
    problems: Sequence[Problem],
    *,
    database: str,
    threads: int,
    seed: int,
    budget_s: float,
    max_error: float = 0.0,
    batch_invariant: bool = False,
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
        "batch_invariant": batch_invariant,
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
    return [
        Deployed(**{**row, "torch": Interval(**row["torch"]), "served": Interval(**row["served"])})
        for row in json.loads(done.stdout)
    ]


def _answer(request: dict[str, Any]) -> list[Deployed]:
    import torch

    from tilewright.runtime import PreparedCall

    torch.set_num_threads(request["threads"])
    op = find_op(request["op"])
    problems = [op.problem_from_dict(fields) for fields in request["problems"]]
    signature = problems[0].signature
    weights = {name: torch.from_numpy(array) for name, array in op.weights(signature, request["seed"]).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the torch side has no database on purpose
        plain = PreparedCall.prepare(signature, weights, threads=request["threads"], database="/dev/null/no-database")
    tuned = PreparedCall.prepare(
        signature,
        weights,
        threads=request["threads"],
        database=request["database"],
        max_error=request["max_error"],
        batch_invariant=request["batch_invariant"],
    )
    return [
        _race(op, problem, tuned, plain, request["seed"], request["budget_s"] / len(problems)) for problem in problems
    ]


def _race(
    op: Any, problem: Problem, tuned: Callable[..., Any], plain: Callable[..., Any], seed: int, budget_s: float
) -> Deployed:
    """Alternate the two, on several routings so that weights do not stay in the cache."""
    import torch

    calls, all_outputs = [], []
    for routing_seed in range(seed, seed + 4):
        inputs = {name: torch.from_numpy(array) for name, array in op.inputs(problem, routing_seed).items()}
        specs = op.tensors(problem.signature)
        sizes = sizes_of(specs, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
        sizes.update(problem.output_sizes)
        outputs = {
            spec.name: torch.from_numpy(np.empty(shape_of(spec, sizes), DTYPES[spec.dtype]))
            for spec in outputs_of(specs)
        }
        all_outputs.append(outputs)
        tensors = {**inputs, **outputs}
        calls.append([tensors.get(spec.name) for spec in specs if spec.role != "weight"])
    tuned(*calls[0])
    results = {name: tensor.clone() for name, tensor in all_outputs[0].items()}
    plain(*calls[0])
    error = max(_difference(results[name], expected) for name, expected in all_outputs[0].items())
    times: dict[str, list[float]] = {"tuned": [], "plain": []}
    deadline = time.perf_counter() + budget_s
    for round_ in range(-1, _ROUNDS):
        for name, call in (("tuned", tuned), ("plain", plain)):
            begin = time.perf_counter_ns()
            call(*calls[round_ % len(calls)])
            if round_ >= 0:
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
        if round_ >= 5 and time.perf_counter() > deadline:
            break
    speedup = paired_ratio(times["plain"], times["tuned"])
    return Deployed(
        tokens=problem.dynamic_size,
        torch=median_interval(times["plain"]),
        served=median_interval(times["tuned"]),
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        rounds=speedup.pairs,
        error=error,
    )


def _difference(result: Any, expected: Any) -> float:
    """Largest difference relative to the largest value; 0 where there is nothing to compare."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return float((result - expected).abs().max()) / scale if scale else 0.0


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in _answer(json.load(sys.stdin))]))
