"""How good a prediction was, where the kernels that it ranked were measured, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FEWEST = 3
"""Kernels that have an order to speak of."""


@dataclass(frozen=True)
class Quality:
    """Of the predictions for the kernels of one race."""

    size: int
    kernels: int
    regret: float
    """By which the one that was predicted the fastest is slower than the fastest, as a share of the latter's time."""
    rank_correlation: float | None
    """Spearman's: 1 for the same order, -1 for the opposite one; None for fewer than three kernels, or equal times."""


def quality(size: int, predicted_us: Sequence[float], measured_us: Sequence[float]) -> Quality:
    """Compare predictions of kernels with what was measured of them at ``size``.

    Args:
        size: of the problem.
        predicted_us: of each kernel, at least one.
        measured_us: of the same kernels.

    """
    predicted, measured = np.asarray(predicted_us), np.asarray(measured_us)
    chosen = measured[int(np.argmin(predicted))]
    return Quality(size, len(predicted), float(chosen / measured.min() - 1), _spearman(predicted, measured))


def _spearman(left: NDArray[np.float64], right: NDArray[np.float64]) -> float | None:
    if len(left) < _FEWEST:
        return None
    ranks = [_ranks(left), _ranks(right)]
    if any(np.ptp(each) == 0 for each in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place of each value in rising order; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return mean
