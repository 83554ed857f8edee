"""What a plan brings where it is deployed: the runtime's calls raced against the default and plain torch.

Run as ``python -m tilewright.tuner.plan.deployed``, a process of its own, for kernels run in it.
"""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.child import connect, serve
from tilewright.codegen.workers.process import WorkerLostError, WorkerProcess
from tilewright.directories import KEY_VARIABLE
from tilewright.tuner.evaluation.cpu.binding import DTYPES
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES, Interval, Ratio, median_interval, paired_ratio
from tilewright.tuner.evaluation.tensors import outputs_of, shape_of, sizes_of
from tilewright.tuner.plan.decide import replaces

_ROUNDS = 25
_LIMIT_S = 300
_SETS = 4
"""Of inputs, in turn."""
_SETS_BYTES = 1 << 30
"""Of memory that they may take together, as far as there are several."""
_SERVED, _TORCH, _DEFAULT = "served", "torch", "default"


class RaceLost(Exception):  # noqa: N818  (named for what happened)
    """A race was not finished; the message says why."""


@dataclass(frozen=True)
class Deployed:
    """One problem, as an engine would see it: interleaved calls from Python."""

    size: int
    served_us: tuple[float, ...]
    """Times in us of what the runtime serves; those of the others at the same place are of the same moment."""
    torch_us: tuple[float, ...]
    default_us: tuple[float, ...] | None
    """None where it was not in the race."""
    error: float
    """Largest difference between what is served and torch, relative to the largest of torch's."""
    noise: float = 0.0
    """What became of two equal times: of a kernel that was raced with itself, at the nearest size where one was."""
    kernel_key: str | None = None
    """Of the kernel that was served; None: plain torch."""

    @property
    def served(self) -> Interval:
        """Median time in us of what the runtime serves."""
        return median_interval(self.served_us)

    @property
    def torch(self) -> Interval:
        """Median time in us of plain torch."""
        return median_interval(self.torch_us)

    @property
    def default(self) -> Interval | None:
        """Median time in us of the default, where it was in the race."""
        return median_interval(self.default_us) if self.default_us else None

    @property
    def over_torch(self) -> Ratio:
        """Torch's time over that of what is served, pair by pair."""
        return paired_ratio(self.torch_us, self.served_us)

    @property
    def over_default(self) -> Ratio | None:
        """The default's time over that of what is served, pair by pair."""
        return paired_ratio(self.default_us, self.served_us) if self.default_us else None

    @property
    def slower_than_torch(self) -> bool:
        """Whether torch takes the place of what is served."""
        return self._loses_to(self.torch_us)

    @property
    def slower_than_default(self) -> bool:
        """Whether the default takes the place of what is served."""
        return self.default_us is not None and self._loses_to(self.default_us)

    @property
    def torch_beats_default(self) -> bool:
        """Whether torch, where both are faster than what is served, is the one to serve."""
        if self.default_us is None:
            return True
        return replaces(np.array(self.torch_us), np.array(self.default_us), noise=self.noise)

    def _loses_to(self, times_us: tuple[float, ...]) -> bool:
        return replaces(np.array(times_us), np.array(self.served_us), noise=self.noise)

    def document(self) -> dict[str, Any]:
        """As JSON, with the samples, intervals and error of what was measured."""
        document = {
            "kernel": self.kernel_key,
            "torch": _timed(self.torch, None),
            "served": _timed(self.served, self.error),
            "speedup": _ratio_document(self.over_torch),
        }
        if self.default is not None and self.over_default is not None:
            document |= {
                "default": _timed(self.default, None),
                "speedup_over_default": _ratio_document(self.over_default),
            }
        return document


class DeployedRaces:
    """A process that races what the runtime serves against plain torch and the default, as often as it is asked to.

    It starts with the first race, and ends with the context. Kernels run in it, so that it may be lost; the next race
    starts another one.
    """

    def __init__(self) -> None:
        self._worker: WorkerProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def race(
        self,
        problems: Sequence[Problem],
        *,
        served: Path,
        default: Path | None,
        threads: int,
        seed: int,
        budget_s: float,
        max_error: float = 0.0,
        batch_invariant: bool = False,
    ) -> list[Deployed]:
        """Race at each of ``problems``.

        Args:
            problems: of one signature.
            served: a database that holds the plan in question and no other.
            default: one whose plan is the default config; None: without it.
            threads: of a call.
            seed: of weights, inputs and the order of calls.
            budget_s: wall seconds for all races together; every contender is called at least seven times.
            max_error: see :meth:`tilewright.runtime.PreparedCall.prepare`, as the next one.
            batch_invariant: of the plan in question.

        Raises:
            RaceLost: when the process ended, or took too long.

        """
        request = {
            "op": problems[0].signature.op,
            "problems": [problem.to_dict() for problem in problems],
            "served": str(served),
            "default": None if default is None else str(default),
            "threads": threads,
            "seed": seed,
            "budget_s": budget_s,
            "max_error": max_error,
            "batch_invariant": batch_invariant,
        }
        answer = self._ask(request, _LIMIT_S + budget_s)
        return [_from_document(row) for row in answer["rows"]]

    def _ask(self, request: Message, limit_s: float) -> Message:
        if self._worker is None:
            # What is raced is a file of ours, which nobody signed.
            kept = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
            self._worker = WorkerProcess("tilewright.tuner.plan.deployed", start_limit_s=_LIMIT_S, environment=kept)
        try:
            return self._worker.ask(request, limit_s=limit_s)
        except WorkerLostError as error:
            self._end()
            raise RaceLost(str(error)) from error

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _from_document(row: Mapping[str, Any]) -> Deployed:
    times = {name: row[name] and tuple(row[name]) for name in ("served_us", "torch_us", "default_us")}
    return Deployed(**{**row, **times})


def _timed(times: Interval, error: float | None) -> dict[str, Any]:
    return {
        "median_us": times.median,
        "low_us": times.low,
        "high_us": times.high,
        "samples": times.samples,
        "error_against_torch": error,
    }


def _ratio_document(ratio: Ratio) -> dict[str, float | None]:
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high, "samples": ratio.pairs}


def _answer(request: dict[str, Any]) -> list[Deployed]:
    import torch

    from tilewright.runtime import PreparedCall, ServeOptions

    threads = request["threads"]
    torch.set_num_threads(threads)
    op = find_op(request["op"])
    problems = [op.problem_from_dict(fields) for fields in request["problems"]]
    signature = problems[0].signature
    weights = {name: torch.from_numpy(array) for name, array in op.weights(signature, request["seed"]).items()}
    served = ServeOptions(
        threads=threads,
        database=request["served"],
        max_error=request["max_error"],
        batch_invariant=request["batch_invariant"],
    )
    contenders: dict[str, Callable[..., Any]] = {_SERVED: PreparedCall.prepare(signature, weights, options=served)}
    if request["default"] is not None:
        contenders[_DEFAULT] = PreparedCall.prepare(
            signature, weights, options=ServeOptions(threads=threads, database=request["default"])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the torch side has no database on purpose
        contenders[_TORCH] = PreparedCall.prepare(
            signature, weights, options=ServeOptions(threads=threads, database="/dev/null/no-database")
        )
    budget_s = request["budget_s"] / len(problems)
    return [_race(op, problem, contenders, request["seed"], budget_s) for problem in problems]


def _race(
    op: Any, problem: Problem, contenders: Mapping[str, Callable[..., Any]], seed: int, budget_s: float
) -> Deployed:
    """Call one after the other, on several routings so that weights do not stay in the cache."""
    import torch

    calls, all_outputs = [], []
    # Large inputs are in no cache, and take their memory as often.
    sets = max(1, min(_SETS, _SETS_BYTES // max(1, op.input_bytes(problem))))
    for routing_seed in range(seed, seed + sets):
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
    contenders[_SERVED](*calls[0])
    results = {name: tensor.clone() for name, tensor in all_outputs[0].items()}
    contenders[_TORCH](*calls[0])
    error = max(_difference(results[name], expected) for name, expected in all_outputs[0].items())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, draw = list(contenders), random.Random(seed)
    deadline = time.perf_counter() + budget_s
    for round_ in range(-1, _ROUNDS):
        draw.shuffle(order)
        for name in order:
            begin = time.perf_counter_ns()
            contenders[name](*calls[round_ % len(calls)])
            if round_ >= 0:
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
        if round_ + 1 >= MIN_SAMPLES and time.perf_counter() > deadline:
            break
    return Deployed(
        size=problem.size,
        served_us=tuple(times[_SERVED]),
        torch_us=tuple(times[_TORCH]),
        default_us=tuple(times[_DEFAULT]) if _DEFAULT in times else None,
        error=error,
    )


def _difference(result: Any, expected: Any) -> float:
    """Largest difference relative to the largest value; 0 where there is nothing to compare."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return float((result - expected).abs().max()) / scale if scale else 0.0


def main() -> None:
    """Answer requests until the parent closes the connection."""
    channel, _ = connect()
    serve(channel, lambda request, _: {"rows": [asdict(row) for row in _answer(request)]})


if __name__ == "__main__":
    main()
