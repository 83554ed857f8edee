"""Medians with confidence, and comparisons that respect the noise. No distribution is assumed anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CONFIDENCE = 0.95
TOLERATED = 0.02
"""By which a kernel may be slower before that speaks against it: what races here resolve."""
MIN_SAMPLES = 6
"""Fewest samples whose range bounds the median with 95 % confidence."""


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % confidence interval, in the samples' unit."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width, as a share of the median."""
        return (self.high - self.low) / (2 * self.median)


@dataclass(frozen=True)
class Ratio:
    """How one kernel's time compares with another's: the median of paired ratios with its 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int

    @property
    def noise(self) -> float:
        """Largest deviation from 1 inside the interval: between equal kernels, the noise of this machine."""
        return max(self.high - 1, 1 - self.low)


def median_interval(samples: ArrayLike) -> Interval:
    """Median of ``samples`` between two order statistics that bound it with 95 % confidence.

    With fewer than six samples the interval is their range, which covers less.

    Raises:
        ValueError: for no samples.

    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    if not len(ordered):
        raise ValueError("a median needs at least one sample")
    rank = _lower_rank(len(ordered))
    return Interval(float(np.median(ordered)), float(ordered[rank]), float(ordered[len(ordered) - 1 - rank]))


def paired_ratio(times: ArrayLike, baseline: ArrayLike) -> Ratio:
    """Ratio of ``times`` to ``baseline``, sample i of one paired with sample i of the other.

    Pairs taken right after one another share what disturbed the machine at that moment, so that it cancels. Surplus
    samples of the longer one are left out.

    Raises:
        ValueError: for no pairs.

    """
    above, below = np.asarray(times, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    pairs = min(len(above), len(below))
    interval = median_interval(above[:pairs] / below[:pairs])
    return Ratio(interval.median, interval.low, interval.high, pairs)


def beats(candidate: Ratio, noise: float) -> bool:
    """Whether a candidate may replace the incumbent that it was paired with.

    Its whole interval must lie below 1, and its median by more than ``noise`` (:attr:`Ratio.noise` of a kernel against
    itself): a winner within the noise replaces nothing.
    """
    return candidate.high < 1 and candidate.median < 1 - noise


def clearly_slower(times: NDArray[np.float64], best: NDArray[np.float64], margin: float) -> bool:
    """Whether a contestant need not be timed any further against the ``best`` one.

    With six pairs or more: the interval of their ratio lies above ``1 + margin``. With fewer, every single pair must
    speak against it by a margin that shrinks as they agree (3x after one, 1.5x after two, 1.22x after three): noise
    rarely hits only one side, and by that much, several times running.
    """
    pairs = min(len(times), len(best))
    if pairs >= MIN_SAMPLES:
        return paired_ratio(times, best).low > 1 + margin
    return bool(np.min(times[:pairs] / best[:pairs]) > 1 + 2 / pairs**2)


@lru_cache(maxsize=4096)
def _lower_rank(count: int) -> int:
    """Rank, from 0, of the largest order statistic that lies above the median with 2.5 % probability or less."""
    # It does when no more than ``rank`` samples are below the median, and their number is binomial(count, 1/2).
    log_half_power = count * math.log(0.5)
    log_factorial = math.lgamma(count + 1)
    below = 0.0
    for rank in range(count // 2 + 1):
        below += math.exp(log_factorial - math.lgamma(rank + 1) - math.lgamma(count - rank + 1) + log_half_power)
        if below > (1 - _CONFIDENCE) / 2:
            return max(rank - 1, 0)
    return count // 2
