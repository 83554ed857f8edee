"""What every sampler of an enumerated space has in common: which configs are left, and what to try first.

Such a sampler is an ``optuna.samplers.BaseSampler``: give it to ``optuna.create_study``, then use ``study.optimize``,
or ``study.ask`` and ``study.tell``. Whatever has happened it reads from the study, at every trial anew: trials that
were added (:meth:`optuna.Study.add_trial`), enqueued, or told by another process count as its own.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tilewright.codegen.space import Config, Space
from tilewright.tuner.search.encoding import row_index
from tilewright.tuning_db.records import TIMINGS, Timing

FIRST_FROM_PRIORS = 4
"""Configs of neighbouring problems that are tried before anything else (fewer when the budget is small)."""

_FIXED: Final = "fixed_params"
"""The system attribute in which ``Study.enqueue_trial`` keeps the parameters of a trial that waits."""

# ruff: noqa: ARG002 - the signatures are Optuna's


class SearchExhausted(optuna.TrialPruned):
    """Every config of the space was suggested already; ``Study.optimize`` takes it for the end of a pruned trial."""


@dataclass(frozen=True)
class Prior:
    """Results of a neighbouring problem (another size, another device): its best configs are tried first.

    `results` holds (config, time in us), successes only; configs outside of the searched space have no influence.
    Priors are given nearest neighbour first, and those that were measured before those that were predicted.
    """

    source: str
    results: tuple[tuple[Config, float], ...]
    timing: Timing = "measured"
    """How the times are known. Predicted ones are weaker: they are tried when no measured ones are left."""


@dataclass(frozen=True)
class History:
    """What a study knows of the rows of a space, but for the trial that is being sampled."""

    values: Mapping[int, float | None]
    """Of finished trials' rows, the value to be minimised, a negative one where it is maximised; None: it failed."""
    running: frozenset[int]
    """Rows that are being tried."""
    free: npt.NDArray[np.bool_]
    """[configs], whether a row was neither tried nor is being, nor waits in the study's queue."""


class EnumeratedSampler(BaseSampler):
    """Suggests valid configs of an enumerated space, none of them twice; subclasses choose the row.

    Equal seeds and equal studies give equal suggestions. Several trials may run at a time, and threads may ask. Any
    distributions will do whose values are those of the space, :func:`~tilewright.tuner.search.distributions_of` gives
    some. A queued trial that fixes some parameters is completed by a config that has them.

    Args:
        space: what to search.
        seed: of everything that is drawn.
        budget: trials that are planned; a small one leaves less for exploring.
        priors: what neighbouring problems say, nearest first.

    Raises:
        ValueError: while sampling, for a study of several objectives, and for a parameter that the space does not have.
        SearchExhausted: while sampling, when no config is left; ``Study.optimize`` stops before that.

    """

    def __init__(self, space: Space, *, seed: int, budget: int = 100, priors: Iterable[Prior] = ()) -> None:
        self.space = space
        self.budget = budget
        self._rng = np.random.default_rng(seed)
        self._index = row_index(space)
        self._priors = tuple(priors)
        self._first = _best_of_each(space, self._priors, min(FIRST_FROM_PRIORS, math.ceil(budget / 5)))
        self._chosen: dict[int, int] = {}
        """Rows by the numbers of the trials that they were suggested to."""
        self._lock = threading.Lock()

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether every config was tried, is being tried, or waits in the study's queue."""
        if len(study.get_trials(deepcopy=False)) < len(self.space):
            return False
        return not self._history(study, None).free.any()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: a config is chosen as a whole, but handed out knob by knob in whatever distributions."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose the trial's config; Optuna calls this once, before it asks for the first parameter."""
        with self._lock:
            self._chosen[trial.number] = self._choose(study, trial)
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return what the chosen config sets a parameter to."""
        params = self._index.params(self._chosen[trial.number])
        if param_name not in params:
            raise ValueError(f"The sampler's space has no parameter {param_name!r}; it has {', '.join(params)}.")
        return params[param_name]

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Stop ``Study.optimize`` when nothing is left to try."""
        if self.is_exhausted(study):
            # Raised where trials are asked for and told one by one: there is no loop to be stopped.
            with suppress(RuntimeError):
                study.stop()

    def reseed_rng(self) -> None:
        """Draw otherwise from now on; Optuna calls it where it has copied the sampler into another process."""
        self._rng = np.random.default_rng()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @abstractmethod
    def _propose(self, study: optuna.Study, trial: FrozenTrial, history: History) -> int:
        """Choose a free row; there is at least one."""

    def _any_free(self, history: History) -> int:
        """Draw a free row, each equally likely."""
        return int(self._rng.choice(np.flatnonzero(history.free)))

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> int:
        history = self._history(study, trial.number)
        if not history.free.any():
            raise SearchExhausted(f"all {len(self.space)} configs of the space were tried")
        if fixed := trial.system_attrs.get(_FIXED):
            return self._completed(fixed, history)
        while self._first:
            row = self._first.pop(0)
            if history.free[row]:
                return row
        return self._propose(study, trial, history)

    def _completed(self, fixed: Mapping[str, Any], history: History) -> int:
        """Draw a row that has the parameters which a queued trial fixes; any free one where none has."""
        fitting = history.free.copy()
        for parameter, column in zip(self.space.parameters, self.space.indices.T, strict=True):
            if parameter.name in fixed:
                fitting &= column == parameter.position.get(fixed[parameter.name], -1)
        return int(self._rng.choice(np.flatnonzero(fitting if fitting.any() else history.free)))

    def _history(self, study: optuna.Study, current: int | None) -> History:
        if len(study.directions) > 1:
            raise ValueError(f"{type(self).__name__} minimises one value; the study has {len(study.directions)}.")
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        values: dict[int, float | None] = {}
        running = set()
        free = np.ones(len(self.space), dtype=bool)
        for trial in study.get_trials(deepcopy=False):
            row = self._row(trial) if trial.number != current else None
            if row is None:
                continue
            free[row] = False
            if trial.state.is_finished():
                told = trial.value if trial.state == TrialState.COMPLETE else None
                values[row] = sign * told if told is not None and math.isfinite(told) else None
            elif trial.state == TrialState.RUNNING:
                running.add(row)
        return History(values, frozenset(running), free)

    def _row(self, trial: FrozenTrial) -> int | None:
        """Which row a trial is about, whose parameters may not all be suggested yet; None when it is none."""
        if trial.state == TrialState.RUNNING and trial.number in self._chosen:
            return self._chosen[trial.number]
        waits = trial.state == TrialState.WAITING
        return self._index.find(trial.system_attrs.get(_FIXED, {}) if waits else trial.params)


def _best_of_each(space: Space, priors: Sequence[Prior], count: int) -> list[int]:
    """Rows of the priors' best configs, at most `count`; those that were measured first.

    Among priors of equal evidence comes the best of every source before the second best of any.
    """
    rows: list[int] = []
    for timing in reversed(TIMINGS):
        ranked = [sorted(prior.results, key=lambda result: result[1]) for prior in priors if prior.timing == timing]
        for place in range(max(map(len, ranked), default=0)):
            for results in ranked:
                row = space.find(results[place][0]) if place < len(results) else None
                if len(rows) < count and row is not None and row not in rows:
                    rows.append(row)
    return rows
