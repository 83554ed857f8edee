"""A race among checked kernels, run again without those that ruin it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.evaluation.faults import CRASHES_TO_BLAME, KernelFaultError, failed
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.racing import Lap, RaceRules, race
from tilewright.tuner.evaluation.statistics import median_interval
from tilewright.tuning_db.records import Outcome

_LOSSES_TO_GIVE_UP = 5
"""Workers that died while they ran nothing, after which all that is left of a batch counts as crashed."""

R = TypeVar("R")


class Track(Protocol):
    """Where kernels of one problem, known by their index, are timed. Its methods raise KernelFaultError."""

    def start(self, racers: Sequence[int]) -> Lap:
        """Begin a race of ``racers``, or begin it anew; what runs a lap of it."""

    def blamed(self, fault: KernelFaultError) -> int | None:
        """Whose call a fault was; None when nobody's."""

    def check_again(self, racer: int) -> float:
        """Relative error of a kernel after its many calls."""


class Contest:
    """Kernels that were right when checked, to be timed on one problem.

    Args:
        track: where they run.
        keys: of the contestants, each with its own index; the same kernel may come twice.
        order: shuffles the laps.

    """

    def __init__(self, track: Track, keys: Sequence[str], order: random.Random) -> None:
        self._track = track
        self._keys = keys
        self._order = order
        self._crashes: Counter[int | None] = Counter()

    def run(self, checked: Sequence[Evaluation], *, budget_s: float, rules: RaceRules) -> list[Evaluation]:
        """Race, then check those that were timed to the end once more; ``checked`` completed by times or a failure.

        A race that a kernel spoils (by a second crash, a hang, an error code) begins again without it, with the same
        budget.
        """
        results = list(checked)
        racers = list(range(len(results)))
        while racers:
            try:
                result = race(racers, self._track.start(racers), budget_s=budget_s, rules=rules, order=self._order)
            except KernelFaultError as fault:
                for racer in self._out(fault, racers):
                    results[racer] = failed(self._keys[racer], fault, "when timed")
                    racers.remove(racer)
                continue
            for racer, samples in result.samples_us.items():
                if racer in result.finalists:
                    results[racer] = self._check_again(racer, results[racer])
                if results[racer].outcome is Outcome.OK:
                    results[racer] = _timed(results[racer], samples)
            break
        return results

    def _out(self, fault: KernelFaultError, racers: Sequence[int]) -> list[int]:
        """Contestants that are out because of ``fault``: none yet for a crash that may be somebody else's fault."""
        blamed = self._track.blamed(fault)
        if fault.outcome is Outcome.CRASHED:
            self._crashes[blamed] += 1
            if self._crashes[blamed] < (_LOSSES_TO_GIVE_UP if blamed is None else CRASHES_TO_BLAME):
                return []
        return list(racers) if blamed is None else [blamed]

    def _check_again(self, racer: int, checked: Evaluation) -> Evaluation:
        """Whether a kernel is still right after its many calls."""
        try:
            error = self._track.check_again(racer)
        except KernelFaultError as fault:
            return failed(self._keys[racer], fault, "after it was timed; it was right before")
        return replace(checked, error=max(error, checked.error or 0.0))


def survived(run: Callable[[], R]) -> R:
    """What ``run`` returns, which is tried once more after a crash.

    Raises:
        KernelFaultError: when it fails (crashes: twice).

    """
    for _ in range(CRASHES_TO_BLAME - 1):
        try:
            return run()
        except KernelFaultError as fault:
            if fault.outcome is not Outcome.CRASHED:
                raise
    return run()


def _timed(checked: Evaluation, samples_us: NDArray[np.float64]) -> Evaluation:
    interval = median_interval(samples_us)
    return replace(
        checked,
        samples_us=tuple(samples_us.tolist()),
        median_us=interval.median,
        low_us=interval.low,
        high_us=interval.high,
    )
