"""An Optuna sampler: a Gaussian process over every valid config of an enumerated space, and expected improvement."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import FrozenTrial
from scipy.special import erfcx, ndtr
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from tilewright.codegen.space import Space
from tilewright.tuner.search.features import FloatArray, features_of
from tilewright.tuner.search.regression import Kernel, Posterior, fit
from tilewright.tuner.search.sampler import EnumeratedSampler, History, Prior
from tilewright.tuner.search.targets import compressed, logs_or_nan
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


class GaussianProcessSampler(EnumeratedSampler):
    """An exact Gaussian process on log time over all valid configs, kept incrementally; no inner optimiser.

    Failed and pruned trials count as badly as the slowest success. A config that is being tried is believed to turn
    out as predicted, so that trials that run side by side spread out. Priors with enough results become further axes
    of the surrogate. From a space of more than MAX_CANDIDATES configs, a seeded sample, and the neighbours of the best
    config, are the candidates. Its arguments are those of :class:`~tilewright.tuner.search.sampler.EnumeratedSampler`.
    """

    def __init__(self, space: Space, *, seed: int, budget: int = 100, priors: Iterable[Prior] = ()) -> None:
        super().__init__(space, seed=seed, budget=budget, priors=priors)
        own = features_of(space)
        with BLAS.limit(limits=1, user_api="blas"):
            self._features = with_prior_axes(space, own, self._priors)
        informed = self._features.group_count > own.group_count
        spread = FIRST_SPREAD_WITH_PRIORS if informed else FIRST_SPREAD
        self._start = spread_rows(own.points, min(spread, budget), self._rng)
        self._believed: dict[int, float] = {}
        """Log times that configs were predicted to take when they were suggested."""
        self._kernel: Kernel | None = None
        self._posterior: Posterior | None = None
        self._candidates = np.arange(0)
        self._fitted_at = 0

    def _propose(self, study: optuna.Study, trial: FrozenTrial, history: History) -> int:
        del study, trial
        while self._start:
            row = self._start.pop(0)
            if history.free[row]:
                return row
        successes = sum(value is not None for value in history.values.values())
        if successes < 2 or not self._features.group_count:
            return self._any_free(history)
        with BLAS.limit(limits=1, user_api="blas"):
            return self._best_candidate(history)

    def _best_candidate(self, history: History) -> int:
        posterior = self._up_to_date(history)
        targets, best, centre, scale = self._targets(history, posterior.observed)
        mean, deviation = posterior.predict(targets)
        gain = log_expected_improvement(mean, deviation, best)
        gain[~history.free[self._candidates]] = -np.inf
        choice = int(np.argmax(gain))
        row = int(self._candidates[choice])
        if not history.free[row]:
            return self._any_free(history)
        self._believed[row] = centre + scale * float(mean[choice])
        return row

    def _up_to_date(self, history: History) -> Posterior:
        """Fit the kernel anew after enough new results; otherwise only add the rows that are new."""
        count = len(history.values)
        since_fit = count - self._fitted_at
        rows = self._rows(history)
        posterior = self._posterior
        # Another study, or a config that was given up: the posterior cannot forget.
        forgotten = posterior is None or not set(posterior.observed) <= set(rows)
        if posterior is None or forgotten or since_fit >= max(10, count // 8) or (count < 30 and since_fit >= 4):
            return self._refit(history, rows)
        known = set(posterior.observed)
        for row in rows:
            if row not in known:
                posterior.observe(row)
        return posterior

    def _refit(self, history: History, rows: list[int]) -> Posterior:
        told = list(history.values)
        targets, *_ = self._targets(history, told)
        self._kernel = fit(self._features, np.array(told), targets, self._kernel)
        self._candidates = self._draw_candidates(history)
        self._posterior = Posterior(self._kernel, self._features, self._candidates, np.array(rows))
        self._fitted_at = len(told)
        return self._posterior

    def _rows(self, history: History) -> list[int]:
        """Rows that the posterior is to know of: those with a result, and those being tried with a believed one."""
        tried = (row for row in self._believed if row in history.running and row not in history.values)
        return [*history.values, *tried]

    def _draw_candidates(self, history: History) -> npt.NDArray[np.intp]:
        free = np.flatnonzero(history.free)
        if len(free) <= MAX_CANDIDATES:
            return free
        best = min((value, row) for row, value in history.values.items() if value is not None)[1]
        differing = (self.space.indices[free] != self.space.indices[best]).sum(axis=1)
        sample = self._rng.choice(free, MAX_CANDIDATES, replace=False)
        return np.union1d(sample, free[differing == 1])

    def _targets(self, history: History, rows: list[int]) -> tuple[FloatArray, float, float, float]:
        """Return the rows' standardised log times, the best success so far, and the centre and scale used."""
        log_of = dict(zip(history.values, logs_or_nan(list(history.values.values())), strict=True))
        # A config that is being tried has no time yet, but a believed one.
        values = compressed([float(log_of[row]) if row in log_of else self._believed[row] for row in rows])
        centre, scale = float(values.mean()), float(values.std()) or 1.0
        best = float(np.nanmin(list(log_of.values())))
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
