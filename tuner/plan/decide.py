"""The one rule by which a kernel takes the place of another, and what stands where the rule is silent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.evaluation.statistics import (
    CONFIDENCE,
    TOLERATED,
    lower_rank,
    paired_ratios,
    unanimous_margin,
)

_Contender = TypeVar("_Contender")


@dataclass(frozen=True)
class Pairing:
    """A candidate and an incumbent in one race."""

    candidate_us: NDArray[np.float64]
    """Times in microseconds, in order; sample i of both is of the same moment and the same data."""
    incumbent_us: NDArray[np.float64]
    noise: float = 0.0
    """What became of two equal times there: :attr:`tilewright.tuner.evaluation.statistics.Ratio.noise`."""


def replaces(
    candidate_us: NDArray[np.float64],
    incumbent_us: NDArray[np.float64],
    *,
    noise: float = 0.0,
    comparisons: int = 1,
) -> bool:
    """Whether a candidate takes the place of the incumbent that it was raced with.

    It does when it is faster by more than ``noise`` and by more than 2 % (what races resolve), and the interval of the
    paired ratio of their times is below 1. A winner within the noise replaces nothing.

    Args:
        candidate_us: times, in order; one of each pair.
        incumbent_us: the others.
        noise: what became of two equal times: a kernel raced with itself. Of predictions, what the model is off by.
        comparisons: how many such questions are asked at once. The more there are, the surer each answer has to be, so
            that with 95 % confidence none of equal kernels replaces another (Bonferroni).

    """
    return replaces_overall([Pairing(candidate_us, incumbent_us, noise)], comparisons=comparisons)


def replaces_overall(pairings: Sequence[Pairing], *, comparisons: int = 1) -> bool:
    """Whether a candidate takes the place of an incumbent by several races together, of which each counts as much.

    The same rule for the geometric mean of their ratios: the races are independent, so that what each may be off by
    adds in quadrature. No races, no change.
    """
    if not pairings:
        return False
    logs, slacks = [], []
    for pairing in pairings:
        ratios = paired_ratios(pairing.candidate_us, pairing.incumbent_us)
        logs.append(math.log(float(np.median(ratios))))
        slacks.append(math.log(_upper_bound(ratios, (1 - CONFIDENCE) / 2 / comparisons)) - logs[-1])
    mean = sum(logs) / len(logs)
    noise = math.hypot(*(pairing.noise for pairing in pairings)) / len(pairings)
    return mean + math.hypot(*slacks) / len(slacks) < 0 and mean < math.log(1 - min(max(noise, TOLERATED), 0.99))


def preferred(contenders: Sequence[_Contender], replaces_: Callable[[_Contender, _Contender], bool]) -> _Contender:
    """Who stands, of ``contenders`` in their canonical order, when each challenges in turn; at least one.

    Whoever the rule does not tell apart from those before it changes nothing, so that equal contenders give the same
    answer every time.
    """
    incumbent, *challengers = contenders
    for challenger in challengers:
        if replaces_(challenger, incumbent):
            incumbent = challenger
    return incumbent


def _upper_bound(ratios: NDArray[np.float64], tail: float) -> float:
    """What the median ratio lies above with a probability of at most ``tail``."""
    rank = lower_rank(len(ratios), tail)
    if rank is None:  # so few that all of them must agree, and by a margin
        return float(np.max(ratios)) * (1 + unanimous_margin(len(ratios)))
    return float(np.sort(ratios)[len(ratios) - 1 - rank])
