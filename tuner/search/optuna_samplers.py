"""Optuna's own samplers over an enumerated space: they propose, and the nearest config that is left is tried."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tilewright.codegen.space import Parameter, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search.encoding import distributions_of
from tilewright.tuner.search.sampler import EnumeratedSampler, History, Prior

_PACKAGES: Final = {"CmaEsSampler": ("cmaes",), "GPSampler": ("torch", "scipy"), "QMCSampler": ("scipy",)}
"""Packages that a sampler of Optuna's imports when it is used."""


class RandomConfigSampler(EnumeratedSampler):
    """Optuna's RandomSampler over the configs that are left, each equally likely."""

    def __init__(self, space: Space, *, seed: int, budget: int = 100, priors: Iterable[Prior] = ()) -> None:
        super().__init__(space, seed=seed, budget=budget, priors=priors)
        self._draws = optuna.samplers.RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        """Draw otherwise from now on."""
        super().reseed_rng()
        self._draws.reseed_rng()

    def _propose(self, study: optuna.Study, trial: FrozenTrial, history: History) -> int:
        free = np.flatnonzero(history.free)
        place = IntDistribution(0, len(free) - 1)
        return int(free[self._draws.sample_independent(study, trial, "row of those left", place)])


class NearestConfigSampler(EnumeratedSampler):
    """Any sampler over a space that it does not know to be enumerated.

    What ``proposes`` suggests need be no config, or one that was tried: then it is the config that is left and differs
    from the suggestion least. The study holds what was tried, so that is what ``proposes`` learns from.
    """

    def __init__(
        self, space: Space, proposes: BaseSampler, *, seed: int, budget: int = 100, priors: Iterable[Prior] = ()
    ) -> None:
        super().__init__(space, seed=seed, budget=budget, priors=priors)
        self._proposes = proposes
        self._distributions = distributions_of(space.parameters)
        self._varying = [i for i, p in enumerate(space.parameters) if len(p.values) > 1]
        self._apart = [_distances(p) for p in space.parameters]

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass on what Optuna says."""
        self._proposes.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Pass on what Optuna says, and stop ``Study.optimize`` when nothing is left to try."""
        # BruteForceSampler stops the study, which is refused where trials are told one by one.
        with suppress(RuntimeError):
            self._proposes.after_trial(study, trial, state, values)
        super().after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Draw otherwise from now on."""
        super().reseed_rng()
        self._proposes.reseed_rng()

    def _propose(self, study: optuna.Study, trial: FrozenTrial, history: History) -> int:
        indices = self._proposed(study, trial)
        row = self._index.find_indices(indices)
        if row is not None and history.free[row]:
            return row
        free = np.flatnonzero(history.free)
        distance = np.zeros(len(free))
        for i in self._varying:
            distance += self._apart[i][indices[i]][self.space.indices[free, i]]
        return int(free[np.argmin(distance)])

    def _proposed(self, study: optuna.Study, trial: FrozenTrial) -> list[int]:
        """For every parameter, the index of the value that is nearest to what the sampler suggests."""
        relative = self._proposes.infer_relative_search_space(study, trial)
        drawn = dict(self._proposes.sample_relative(study, trial, relative))
        # Samplers look at what a trial was given so far; Optuna's own object must not know of proposals.
        seen = copy.copy(trial)
        seen.params, seen.distributions = {}, {}
        for parameter in self.space.parameters:
            name, distribution = parameter.name, self._distributions[parameter.name]
            if distribution.single():
                drawn[name] = parameter.values[0]
            elif name not in drawn:
                drawn[name] = self._proposes.sample_independent(study, seen, name, distribution)
            seen.params[name] = drawn[name]
            seen.distributions[name] = distribution
        return [_nearest(parameter, drawn[parameter.name]) for parameter in self.space.parameters]


def optuna_sampler(name: str, seed: int) -> BaseSampler:
    """Make the sampler of ``optuna.samplers`` that is called ``name``, with its own defaults.

    Raises:
        TilewrightError: when there is none of that name, it takes more than a seed, or it needs a missing package.

    """
    known = sampler_names()
    if name not in known:
        raise TilewrightError(
            f"optuna.samplers has no sampler {name!r} that takes nothing but a seed; choose one of {', '.join(known)}"
        )
    missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        packages = " ".join(missing)
        raise TilewrightError(f"optuna's {name} needs {packages}; run: pip install {packages}")
    made = getattr(optuna.samplers, name)
    # A message for every parameter of the first trials, which no sampler can know yet.
    quiet = [o.name for o in inspect.signature(made).parameters.values() if o.name[:5] == "warn_" and o.default is True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler = made(seed=seed, **dict.fromkeys(quiet, False))
    return sampler


def sampler_names() -> list[str]:
    """Samplers of ``optuna.samplers`` that can be made from a seed alone."""
    return [name for name in optuna.samplers.__all__ if _takes_a_seed_alone(getattr(optuna.samplers, name))]


def pinned_tpe(seed: int) -> BaseSampler:
    """Optuna's tree-structured Parzen estimator with its arguments pinned: its defaults change between versions."""
    with warnings.catch_warnings():
        # Some releases call multivariate and constant_liar experimental; both are wanted.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=10, n_ei_candidates=24, multivariate=True, group=False, constant_liar=True, seed=seed
        )


def _takes_a_seed_alone(member: Any) -> bool:
    if not inspect.isclass(member) or not issubclass(member, BaseSampler) or inspect.isabstract(member):
        return False
    options = inspect.signature(member).parameters
    return "seed" in options and all(option.default is not option.empty for option in options.values())


def _distances(parameter: Parameter) -> npt.NDArray[np.float64]:
    """How far values are from each other, float64 [values, values]: numbers by rank, from 0 to 1; others 0 or 1."""
    values = parameter.values
    known = [i for i, v in enumerate(values) if isinstance(v, int | float) and not isinstance(v, bool)]
    apart = 1.0 - np.eye(len(values))
    if len(known) > 1:
        rank = np.arange(len(known)) / (len(known) - 1)
        apart[np.ix_(known, known)] = np.abs(rank[:, None] - rank[None, :])
    return apart


def _nearest(parameter: Parameter, value: Any) -> int:
    """Index of the value that is nearest to ``value``, which may lie between the values of a number."""
    index = parameter.position.get(value)
    if index is not None:
        return index
    numbers = np.array(parameter.values, dtype=float)
    distribution = distributions_of([parameter])[parameter.name]
    assert isinstance(distribution, IntDistribution)
    if distribution.log:
        return int(np.argmin(np.abs(np.log(numbers) - np.log(value))))
    return int(np.argmin(np.abs(numbers - value)))
