"""Medians with confidence, and comparisons that respect the noise. No distribution is assumed anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
TOLERATED = 0.02
"""By which a kernel may be slower before that speaks against it: what races here resolve."""
MIN_SAMPLES = 6
"""Fewest samples whose range bounds the median with 95 % confidence."""


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % confidence interval, in the samples' unit."""

    median: float
    low: float | None
    """None, as ``high``: there are too few samples for an interval."""
    high: float | None
    samples: int

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width, as a share of the median."""
        return None if self.low is None or self.high is None else (self.high - self.low) / (2 * self.median)


@dataclass(frozen=True)
class Ratio:
    """How one kernel's time compares with another's: the median of paired ratios with its 95 % interval."""

    median: float
    low: float | None
    """None, as ``high``: there are too few pairs for an interval."""
    high: float | None
    pairs: int

    @property
    def noise(self) -> float | None:
        """Largest deviation from 1 inside the interval: between equal kernels, the noise of this machine."""
        return None if self.low is None or self.high is None else max(self.high - 1, 1 - self.low)


def median_interval(samples: ArrayLike) -> Interval:
    """Median of ``samples`` between two order statistics that bound it with 95 % confidence.

    Fewer than :data:`MIN_SAMPLES` do not carry an interval.

    Raises:
        ValueError: for no samples.

    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    count = len(ordered)
    if not count:
        raise ValueError("a median needs at least one sample")
    median = float(np.median(ordered))
    rank = lower_rank(count, (1 - CONFIDENCE) / 2)
    if rank is None:
        return Interval(median, None, None, count)
    return Interval(median, float(ordered[rank]), float(ordered[count - 1 - rank]), count)


def paired_ratio(times: ArrayLike, baseline: ArrayLike) -> Ratio:
    """Ratio of ``times`` to ``baseline``, sample i of one paired with sample i of the other.

    Pairs taken right after one another share what disturbed the machine at that moment, so that it cancels. Surplus
    samples of the longer one are left out.

    Raises:
        ValueError: for no pairs.

    """
    interval = median_interval(paired_ratios(times, baseline))
    return Ratio(interval.median, interval.low, interval.high, interval.samples)


def paired_ratios(times: ArrayLike, baseline: ArrayLike) -> NDArray[np.float64]:
    """Every pair's ratio, in order, [pairs]; surplus samples of the longer one are left out."""
    above, below = np.asarray(times, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    pairs = min(len(above), len(below))
    ratios: NDArray[np.float64] = above[:pairs] / below[:pairs]
    return ratios


def clearly_slower(times: NDArray[np.float64], best: NDArray[np.float64], margin: float) -> bool:
    """Whether a contestant need not be timed any further against the ``best`` one.

    With six pairs or more: the interval of their ratio lies above ``1 + margin``. With fewer, every single pair must
    speak against it by :func:`unanimous_margin`.
    """
    ratio = paired_ratio(times, best)
    if ratio.low is not None:
        return ratio.low > 1 + margin
    return bool(np.min(paired_ratios(times, best)) > 1 + unanimous_margin(ratio.pairs))


def unanimous_margin(pairs: int) -> float:
    """Margin by which each of so few pairs must say the same, to be believed: it shrinks as they agree.

    3x after one, 1.5x after two, 1.22x after three: noise rarely hits only one side, and by that much, several times
    running.
    """
    return 2 / pairs**2


@lru_cache(maxsize=4096)
def lower_rank(count: int, tail: float) -> int | None:
    """Rank, from 0, of the largest of ``count`` order statistics that lies above the median with at most ``tail``.

    None where even the smallest one does with a higher probability. Order statistic ``rank`` lies above the median when
    no more than ``rank`` samples lie below it, and their number is binomial(count, 1/2).
    """
    from scipy.stats import binom  # here, since it takes long to import and not every command compares

    rank = int(binom.ppf(tail, count, 0.5)) - 1
    return rank if rank >= 0 else None
