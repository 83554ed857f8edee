"""Gaussian process regression: the kernel, its fit, and a posterior that grows one observation at a time.

The process has zero mean and an ARD Matern 5/2 kernel; targets are expected to be standardised. Kernel matrices
towards the candidates are float32 (they are large and only rank configs), everything that is factorised is float64.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from tilewright.tuner.search.features import Features, FloatArray

Precision = TypeVar("Precision", np.float32, np.float64)

JITTER = 1e-8
LENGTHSCALE_BOUNDS = (math.log(0.03), math.log(30.0))
SIGNAL_BOUNDS = (-3.0, 3.0)
NOISE_BOUNDS = (math.log(1e-4), 0.0)

MAX_FITTED = 250
"""Observations that a fit of the kernel looks at; the posterior always uses all."""


@dataclass(frozen=True)
class LogPrior:
    """Independent normal beliefs about the logarithms of the kernel's parameters, before any data."""

    mean: FloatArray
    deviation: FloatArray

    @classmethod
    def default(cls, group_count: int) -> "LogPrior":
        """Lengthscales grow with the number of axes, so that distances stay comparable; noise is about 3 %."""
        lengthscale = math.log(0.35) + 0.5 * math.log(max(1, group_count))
        return cls(
            np.array([lengthscale] * group_count + [0.3, math.log(1e-3)]),
            np.array([0.9] * group_count + [1.0, 1.5]),
        )


@dataclass(frozen=True)
class Kernel:
    """`log_parameters` is float64 [groups + 2]: a lengthscale per group, signal variance, noise variance."""

    log_parameters: FloatArray

    @property
    def signal(self) -> float:
        """Variance of the process, in units of the squared targets."""
        return float(np.exp(self.log_parameters[-2]))

    @property
    def noise(self) -> float:
        """Variance of one observation, in units of the squared targets."""
        return float(np.exp(self.log_parameters[-1])) + JITTER

    def scaled(self, features: Features) -> FloatArray:
        """Points divided by their lengthscales, float64 [configs, columns]."""
        return features.points / np.exp(self.log_parameters[features.groups])

    def covariance(self, squared_distances: npt.NDArray[Precision]) -> npt.NDArray[Precision]:
        """Matern 5/2 covariance at squared distances of scaled points, in their shape and precision."""
        r = np.sqrt(5 * np.maximum(squared_distances, 0))
        result: npt.NDArray[Precision] = self.signal * (1 + r + r * r / 3) * np.exp(-r)
        return result


def fit(features: Features, rows: npt.NDArray[np.intp], targets: FloatArray, start: Kernel | None) -> Kernel:
    """Find the kernel that explains standardised `targets` (float64 [n]) at `rows` best, under LogPrior.default.

    From `start` on, where one is given: a few steps are enough after a few more observations.
    """
    prior = LogPrior.default(features.group_count)
    if len(rows) > MAX_FITTED:
        # Evenly by rank, the best and the worst among them: a fit costs O(n^3) a step.
        chosen = np.argsort(targets, kind="stable")[np.linspace(0, len(rows) - 1, MAX_FITTED).astype(int)]
        rows, targets = rows[chosen], targets[chosen]
    distances = _squared_distances(features, rows)
    bounds = [LENGTHSCALE_BOUNDS] * features.group_count + [SIGNAL_BOUNDS, NOISE_BOUNDS]
    result = minimize(
        negative_log_posterior,
        prior.mean if start is None else start.log_parameters,
        args=(distances, targets, prior),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 25 if start is None else 12},
    )
    return Kernel(result.x)


def negative_log_posterior(
    log_parameters: FloatArray, distances: FloatArray, targets: FloatArray, prior: LogPrior
) -> tuple[float, FloatArray]:
    """Value and gradient (float64 [groups + 2]); `distances` is float64 [groups, n, n], squared and unscaled."""
    count = len(targets)
    groups = len(distances)
    weights = np.exp(-2 * log_parameters[:-2])
    signal, noise = np.exp(log_parameters[-2:])
    r = np.sqrt(5 * np.tensordot(weights, distances, axes=1))
    decay = np.exp(-r)
    correlation = (1 + r + r * r / 3) * decay
    covariance = signal * correlation
    covariance[np.diag_indices(count)] += noise + JITTER
    factor = np.linalg.cholesky(covariance)
    explained = cho_solve((factor, True), targets)
    inner = cho_solve((factor, True), np.eye(count)) - np.outer(explained, explained)
    by_distance = inner * (-5 / 6 * signal) * (1 + r) * decay

    surprise = (log_parameters - prior.mean) / prior.deviation
    value = 0.5 * targets @ explained + np.log(np.diag(factor)).sum() + 0.5 * surprise @ surprise
    gradient = surprise / prior.deviation
    gradient[:-2] -= weights * (distances.reshape(groups, -1) @ by_distance.ravel())
    gradient[-2] += 0.5 * signal * (inner * correlation).sum()
    gradient[-1] += 0.5 * noise * np.trace(inner)
    return float(value), gradient


class Posterior:
    """What the process knows about a fixed set of candidates, given the observed rows.

    An observation costs O(candidates x observations) to add; its target is given only when predicting, so that
    an outstanding trial can be observed first (which narrows the variance) and get its value later.
    """

    def __init__(
        self, kernel: Kernel, features: Features, candidates: npt.NDArray[np.intp], observed: npt.NDArray[np.intp]
    ) -> None:
        self._kernel = kernel
        self._points = kernel.scaled(features)
        self._candidates = self._points[candidates].astype(np.float32)
        self._candidate_norms = (self._candidates**2).sum(axis=1)
        self.observed = list(observed)
        covariance = self._between(observed, observed)
        covariance[np.diag_indices(len(observed))] = kernel.signal + kernel.noise
        self._factor = np.linalg.cholesky(covariance)
        count = len(observed)
        # Rows are filled as observations arrive; doubled when full.
        self._whitened = np.empty((2 * count, len(candidates)), dtype=np.float32)
        self._whitened[:count] = solve_triangular(
            self._factor.astype(np.float32), self._towards_candidates(observed), lower=True, check_finite=False
        )
        self._variance = kernel.signal - np.einsum(
            "ij,ij->j", self._whitened[:count], self._whitened[:count], dtype=np.float64
        )

    def observe(self, row: int) -> None:
        """Add one observed row."""
        count = len(self.observed)
        new = np.array([row])
        to_observed = self._between(np.array(self.observed), new)[:, 0]
        link = solve_triangular(self._factor, to_observed, lower=True, check_finite=False)
        scale = math.sqrt(max(self._kernel.signal + self._kernel.noise - link @ link, JITTER))
        if count == len(self._whitened):
            self._whitened = np.concatenate([self._whitened, np.empty_like(self._whitened)])
        fresh = self._towards_candidates(new)[0] - link.astype(np.float32) @ self._whitened[:count]
        self._whitened[count] = fresh / np.float32(scale)
        self._variance -= self._whitened[count].astype(np.float64) ** 2
        factor = np.zeros((count + 1, count + 1))
        factor[:count, :count] = self._factor
        factor[count] = [*link, scale]
        self._factor = factor
        self.observed.append(row)

    def predict(self, targets: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of every candidate, given a target for each observed row (in their order)."""
        white_targets = solve_triangular(self._factor, targets, lower=True, check_finite=False)
        mean = white_targets.astype(np.float32) @ self._whitened[: len(self.observed)]
        return mean.astype(np.float64), np.sqrt(np.maximum(self._variance, JITTER))

    def _towards_candidates(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        points = self._points[rows].astype(np.float32)
        squared = (points**2).sum(axis=1)[:, None] + self._candidate_norms - 2 * points @ self._candidates.T
        return self._kernel.covariance(squared)

    def _between(self, rows: npt.NDArray[np.intp], others: npt.NDArray[np.intp]) -> FloatArray:
        squared = ((self._points[rows][:, None, :] - self._points[others][None, :, :]) ** 2).sum(axis=2)
        return self._kernel.covariance(squared)


def _squared_distances(features: Features, rows: npt.NDArray[np.intp]) -> FloatArray:
    """Per group, between the rows: float64 [groups, n, n]."""
    points = features.points[rows]
    squared = (points[:, None, :] - points[None, :, :]) ** 2
    return np.stack([squared[:, :, features.groups == g].sum(axis=2) for g in range(features.group_count)])
