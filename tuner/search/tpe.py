"""Search by Optuna's tree-structured Parzen estimator, for comparison with ours."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tilewright.codegen.space import Parameter, Space
from tilewright.tuner.search.base import EnumeratedSearch, Prior

optuna.logging.set_verbosity(optuna.logging.WARNING)

PROPOSALS_PER_ASK = 8
"""Proposals that may break a constraint, or repeat a config, before a random valid one is taken instead."""


class TpeSearch(EnumeratedSearch):
    """Optuna's TPE over the indices of the values, with its arguments pinned (its defaults change between versions)."""

    def __init__(self, space: Space, *, seed: int, budget: int, priors: Iterable[Prior] = ()) -> None:
        super().__init__(space, seed=seed, budget=budget, priors=priors)
        with warnings.catch_warnings():
            # Some releases call multivariate and constant_liar experimental; both are wanted.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=10, n_ei_candidates=24, multivariate=True, group=False, constant_liar=True, seed=seed
            )
        self._study = optuna.create_study(sampler=sampler)
        self._varying = [(i, p) for i, p in enumerate(space.parameters) if len(p.values) > 1]
        self._distributions = {p.name: _distribution(p) for _, p in self._varying}
        self._row_of = {tuple(row): i for i, row in enumerate(space.indices.tolist())}
        self._trials: dict[int, int] = {}

    def _propose(self) -> int:
        for _ in range(PROPOSALS_PER_ASK):
            trial = self._study.ask(self._distributions)
            row = self._row_of.get(tuple(trial.params.get(p.name, 0) for p in self.space.parameters))
            if row is not None and self._free[row]:
                self._trials[row] = trial.number
                return row
            # A failed trial is left out of the estimator: a proposal that cannot be tried teaches nothing.
            self._study.tell(trial, state=TrialState.FAIL)
        row = self._any_free()
        self._study.enqueue_trial(self._indices_of(row))
        self._trials[row] = self._study.ask(self._distributions).number
        return row

    def tell(self, config: Mapping[str, Any], time_us: float | None) -> None:
        """Report a config's time in us; see EnumeratedSearch.tell."""
        super().tell(config, time_us)
        row = self.space.find(config)
        if row is None:
            return
        # The estimator ranks pruned trials below all completed ones, which is what a failed config is to us.
        state = TrialState.PRUNED if time_us is None else TrialState.COMPLETE
        if row in self._trials:
            self._study.tell(self._trials.pop(row), time_us, state=state)
            return
        self._study.add_trial(
            create_trial(state=state, value=time_us, params=self._indices_of(row), distributions=self._distributions)
        )

    def _indices_of(self, row: int) -> dict[str, int]:
        indices = self.space.indices[row].tolist()
        return {p.name: indices[i] for i, p in self._varying}


def _distribution(parameter: Parameter) -> BaseDistribution:
    """Numbers are ordered, so their index is an integer; anything else is a choice without order."""
    count = len(parameter.values)
    ordered = all(isinstance(v, int | float) and not isinstance(v, bool) for v in parameter.values)
    return IntDistribution(0, count - 1) if ordered else CategoricalDistribution(range(count))
