"""Search by a Gaussian process over every valid config, and expected improvement."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.special import erfcx, ndtr
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from tilewright.codegen.space import Space
from tilewright.tuner.search.base import EnumeratedSearch, Prior
from tilewright.tuner.search.features import FloatArray, features_of
from tilewright.tuner.search.regression import Kernel, Posterior, fit
from tilewright.tuner.search.targets import compressed, log_or_nan
from tilewright.tuner.search.transfer import with_prior_axes

BLAS = ThreadpoolController()
"""Matrices here are small, and builds keep the other cores busy: BLAS threads that wait for each other cost 10x."""

FIRST_SPREAD = 10
"""Configs tried before the process is fitted, spread over the space."""

FIRST_SPREAD_WITH_PRIORS = 4
"""The same where neighbouring problems say what to expect."""

SPREAD_POOL = 400
"""Random configs among which the spread ones are chosen."""

MAX_CANDIDATES = 30_000
"""Configs that the posterior covers; from a larger space, this many are drawn again at every refit."""


class GaussianProcessSearch(EnumeratedSearch):
    """An exact Gaussian process on log time over all valid configs, kept incrementally; no inner optimiser.

    Failures count as badly as the slowest success. A config that is being tried is believed to turn out as predicted,
    so that outstanding asks spread out. Priors with enough results become further axes of the surrogate. From a space
    of more than MAX_CANDIDATES configs, a seeded sample, and the neighbours of the best config, are the candidates.
    """

    def __init__(self, space: Space, *, seed: int, budget: int, priors: Iterable[Prior] = ()) -> None:
        super().__init__(space, seed=seed, budget=budget, priors=priors)
        own = features_of(space)
        with BLAS.limit(limits=1, user_api="blas"):
            self._features = with_prior_axes(space, own, self._priors)
        informed = self._features.group_count > own.group_count
        spread = FIRST_SPREAD_WITH_PRIORS if informed else FIRST_SPREAD
        self._start = spread_rows(own.points, min(spread, budget), self._rng)
        self._believed: dict[int, float] = {}
        self._kernel: Kernel | None = None
        self._posterior: Posterior | None = None
        self._candidates = np.arange(0)
        self._fitted_at = 0

    def _propose(self) -> int:
        while self._start:
            row = self._start.pop(0)
            if self._free[row]:
                return row
        successes = sum(time_us is not None for time_us in self._told.values())
        if successes < 2 or not self._features.group_count:
            return self._any_free()
        with BLAS.limit(limits=1, user_api="blas"):
            return self._best_candidate()

    def _best_candidate(self) -> int:
        self._update_posterior()
        assert self._posterior is not None
        targets, best, centre, scale = self._targets(self._posterior.observed)
        mean, deviation = self._posterior.predict(targets)
        gain = log_expected_improvement(mean, deviation, best)
        gain[~self._free[self._candidates]] = -np.inf
        choice = int(np.argmax(gain))
        row = int(self._candidates[choice])
        if not self._free[row]:
            return self._any_free()
        self._believed[row] = centre + scale * float(mean[choice])
        return row

    def _update_posterior(self) -> None:
        """Fit the kernel anew after enough new results; otherwise only add the rows that are new."""
        count = len(self._told)
        since_fit = count - self._fitted_at
        if self._kernel is None or since_fit >= max(10, count // 8) or (count < 30 and since_fit >= 4):
            self._refit()
            return
        assert self._posterior is not None
        known = set(self._posterior.observed)
        for row in self._rows():
            if row not in known:
                self._posterior.observe(row)

    def _refit(self) -> None:
        told = list(self._told)
        targets, *_ = self._targets(told)
        self._kernel = fit(self._features, np.array(told), targets, self._kernel)
        self._candidates = self._draw_candidates()
        self._posterior = Posterior(self._kernel, self._features, self._candidates, np.array(self._rows()))
        self._fitted_at = len(told)

    def _rows(self) -> list[int]:
        """Rows that the posterior is to know of: those with a result, and those being tried with a believed one."""
        return [*self._told, *(row for row in self._believed if row in self._pending)]

    def _draw_candidates(self) -> npt.NDArray[np.intp]:
        free = np.flatnonzero(self._free)
        if len(free) <= MAX_CANDIDATES:
            return free
        best = min((time_us, row) for row, time_us in self._told.items() if time_us is not None)[1]
        differing = (self.space.indices[free] != self.space.indices[best]).sum(axis=1)
        sample = self._rng.choice(free, MAX_CANDIDATES, replace=False)
        return np.union1d(sample, free[differing == 1])

    def _targets(self, rows: list[int]) -> tuple[FloatArray, float, float, float]:
        """Return the rows' standardised log times, the best success so far, and the centre and scale used."""
        # A config that is being tried has no time yet, but a believed one.
        logs = [log_or_nan(self._told[row]) if row in self._told else self._believed[row] for row in rows]
        values = compressed(logs)
        centre, scale = float(values.mean()), float(values.std()) or 1.0
        best = min(math.log(t) for t in self._told.values() if t is not None)
        return (values - centre) / scale, (best - centre) / scale, centre, scale


def log_expected_improvement(mean: FloatArray, deviation: FloatArray, best: float) -> FloatArray:
    """Log of the expected improvement below `best` of normal beliefs (float64 [n]); finite however unlikely it is."""
    z = (best - mean) / deviation
    # deviation * (phi(z) + z Phi(z)); below zero the sum cancels unless phi is taken out of it first.
    below, above = np.minimum(z, 0.0), np.maximum(z, 0.0)
    log_density = -0.5 * below**2 - 0.5 * math.log(2 * math.pi)
    log_below = log_density + np.log1p(math.sqrt(math.pi / 2) * below * erfcx(-below / math.sqrt(2)))
    log_above = np.log(np.exp(-0.5 * above**2) / math.sqrt(2 * math.pi) + above * ndtr(above))
    result: FloatArray = np.log(deviation) + np.where(z < 0, log_below, log_above)
    return result


def spread_rows(points: FloatArray, count: int, rng: np.random.Generator) -> list[int]:
    """Rows far from each other: each is the one, of a random pool, that is farthest from those chosen before."""
    pool = rng.choice(len(points), min(SPREAD_POOL, len(points)), replace=False)
    chosen = [0]
    nearest = ((points[pool] - points[pool[0]]) ** 2).sum(axis=1)
    while len(chosen) < min(count, len(pool)):
        farthest = int(np.argmax(nearest))
        chosen.append(farthest)
        nearest = np.minimum(nearest, ((points[pool] - points[pool[farthest]]) ** 2).sum(axis=1))
    return [int(pool[i]) for i in chosen]
