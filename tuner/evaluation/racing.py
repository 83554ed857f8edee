"""Which contestants are timed how often: all of them at first, then only those that may still win."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.evaluation.statistics import MIN_SAMPLES, clearly_slower, median_interval

Lap = Callable[[Sequence[int]], Mapping[int, NDArray[np.float64]]]
"""Times the given contestants, interleaved, in microseconds [sets]; equal positions: equal data."""


@dataclass(frozen=True)
class RaceRules:
    """When a race is over."""

    tight: float = 0.01
    """Half width of the median's interval, as a share of it, that needs no more samples."""
    max_samples: int = 400
    """Of each contestant."""
    eliminate: bool = True
    """Whether contestants that are clearly slower than the best drop out; samples of all are equally many otherwise."""
    least_samples: int = 1
    """Of each contestant: before it drops out within the budget, and before the race ends."""
    overtime: float = 0.0
    """Further budgets that the race may take for ``least_samples``."""


@dataclass(frozen=True)
class RaceResult:
    """Samples of every contestant in microseconds, sample i of all of them from the same lap and the same data."""

    samples_us: Mapping[int, NDArray[np.float64]]
    finalists: frozenset[int]
    """Contestants that were timed to the end."""


def race(
    contestants: Sequence[int],
    run_lap: Lap,
    *,
    budget_s: float,
    rules: RaceRules,
    order: random.Random,
    clock: Callable[[], float] = time.monotonic,
) -> RaceResult:
    """Time contestants until the best are known well enough, or ``budget_s`` is over (at least one lap is run).

    Where those that are left have fewer samples than the rules want of them by then, it goes on for them.

    Args:
        contestants: distinct numbers, at least one.
        run_lap: does the timing.
        budget_s: wall seconds.
        rules: see there.
        order: shuffles every lap, so that nobody always follows the same neighbour.
        clock: seconds.

    """
    end = clock() + budget_s
    last = end + rules.overtime * budget_s
    active = list(contestants)
    samples = {contestant: np.empty(0) for contestant in contestants}
    while True:
        order.shuffle(active)
        for contestant, times in run_lap(active).items():
            samples[contestant] = np.concatenate((samples[contestant], times))
        now = clock()
        if rules.eliminate and (now >= end or len(samples[active[0]]) >= rules.least_samples):
            best = min(active, key=lambda contestant: float(np.median(samples[contestant])))
            active = [c for c in active if c == best or not clearly_slower(samples[c], samples[best], rules.tight)]
        enough = len(samples[active[0]]) >= rules.least_samples  # all that are left have as many
        if now >= (end if enough else last) or all(_known(samples[contestant], rules) for contestant in active):
            return RaceResult(samples, frozenset(active))


def _known(samples: NDArray[np.float64], rules: RaceRules) -> bool:
    """Whether a contestant needs no more laps."""
    if len(samples) >= rules.max_samples:
        return True
    half_width = median_interval(samples).half_width if len(samples) > MIN_SAMPLES else None
    return half_width is not None and half_width <= rules.tight
