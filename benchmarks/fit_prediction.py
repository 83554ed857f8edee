"""Fit the constants of tuner/prediction on some of the problems: ``python -m benchmarks.fit_prediction A100 H100``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from scipy.optimize import minimize

from benchmarks.prediction_data import Candidates, read_candidates, split
from tilewright.tuner.prediction.constants import Constants
from tilewright.tuner.prediction.model import launch_terms, launch_us

_NEAR_BEST = 2.0
_RESTARTS = 8
_START = Constants(3, 0.9, 20, 0.85, 3, 0.7, 0.5, 3, 1.0, 0.5, 0.6, 0.5)
_LOW = Constants(0, 0.3, 0, 0.4, 0.8, 0.05, 0.1, 1, 0, 0, 0.3, 0.5)
_HIGH = Constants(10, 1.0, 120, 1.0, 8, 4, 1, 12, 5, 5, 1, 0.5)


def _vector(constants: Constants) -> np.ndarray:
    return np.array([getattr(constants, field.name) for field in fields(constants)], np.float64)


def fit(parts: Sequence[Candidates]) -> Constants:
    """Constants with the least mean absolute log error: half of it as it is, and all of that within a problem.

    Good candidates weigh more than bad ones, whose order nobody asks for; every part (a device) weighs the same.
    """
    low, high, start = _vector(_LOW), _vector(_HIGH), _vector(_START)
    free = high > low
    weighed = [_weights(part) for part in parts]

    def constants(x: np.ndarray) -> Constants:
        full = start.copy()
        full[free] = np.clip(x, low[free], high[free])
        return Constants(*map(float, full))

    def loss(x: np.ndarray) -> float:
        outside = np.abs(x - np.clip(x, low[free], high[free])).sum()
        mine = constants(x)
        total = 0.0
        for part, (problem, weight, of_problem) in zip(parts, weighed, strict=True):
            error = np.log(launch_us(launch_terms(part.work, part.ceilings, mine), mine) / part.us)
            within = error - (np.bincount(problem, error * weight) / of_problem)[problem]
            total += float((weight * np.abs(error)).mean() / 2 + (weight * np.abs(within)).mean())
        return total / len(parts) + float(outside)

    x = start[free]
    for _ in range(_RESTARTS):
        x = minimize(loss, x, method="Nelder-Mead", options={"maxfev": 700, "xatol": 1e-3, "fatol": 1e-5}).x
    return constants(x)


def _weights(part: Candidates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of each row's problem, weight of each row, and sum of the weights of each problem."""
    problem = np.unique(part.problem, return_inverse=True)[1]
    best = np.full(problem.max() + 1, np.inf)
    np.minimum.at(best, problem, part.us)
    weight = np.exp(-_NEAR_BEST * (part.us / best[problem] - 1))
    weight /= weight.mean()
    return problem, weight, np.bincount(problem, weight)


if __name__ == "__main__":
    print(fit([split(read_candidates(name))[0] for name in sys.argv[1:]]))
