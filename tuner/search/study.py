"""An Optuna study around a search, so that Optuna's tools (its dashboard above all) can look at a tuning run."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from tilewright.codegen.space import Config, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search.base import Search

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class ToldTrial:
    """A finished trial from our own database: what a study is rebuilt from."""

    config: Config
    time_us: float | None
    outcome: str


class TuningStudy:
    """A search whose trials are mirrored in an in-memory Optuna study; a Search itself.

    Every trial carries its outcome and the key of its problem as user attributes. Our database remains the record:
    after an interruption the study is rebuilt from there.
    """

    def __init__(self, space: Space, search: Search, *, name: str, problem: str) -> None:
        self.name = name
        self._search = search
        self._problem = problem
        self._sampler = _HandsOver()
        self.study = optuna.create_study(study_name=name, sampler=self._sampler)
        self.study.set_user_attr("problem", problem)
        self._distributions: dict[str, BaseDistribution] = {
            p.name: CategoricalDistribution(p.values) for p in space.parameters
        }
        self._space = space
        self._running: dict[Config, optuna.Trial] = {}

    def ask(self) -> Config:
        """Return the search's next config, mirrored as a running trial; raises SearchExhausted as the search does."""
        config = self._search.ask()
        self._sampler.config = config
        self._running[config] = self.study.ask(self._distributions)
        return config

    def tell(self, config: Mapping[str, Any], time_us: float | None, *, outcome: str | None = None) -> None:
        """Report a config's time in us, None when it failed, and what became of it in one word (ok, wrong, ...).

        Told without having been asked for, it becomes a finished trial of its own.
        """
        told = Config(config)
        self._search.tell(told, time_us)
        state = TrialState.FAIL if time_us is None else TrialState.COMPLETE
        attributes = {"outcome": outcome or ("failed" if time_us is None else "ok"), "problem": self._problem}
        running = self._running.pop(told, None)
        if running is None:
            self.study.add_trial(self._finished(told, time_us, state, attributes))
            return
        for name, value in attributes.items():
            running.set_user_attr(name, value)
        self.study.tell(running, time_us, state=state)

    def rebuild(self, trials: Iterable[ToldTrial]) -> None:
        """Replay finished trials, in the order in which they were told: a resumed run goes on where it was."""
        for trial in trials:
            self.tell(trial.config, trial.time_us, outcome=trial.outcome)

    def export(self, path: Path) -> None:
        """Write this study to a new SQLite file; see export_studies."""
        export_studies([self], path)

    def _finished(
        self, config: Config, time_us: float | None, state: TrialState, attributes: dict[str, Any]
    ) -> FrozenTrial:
        if config not in self._space:
            # Optuna would refuse values that its distributions lack; such a config is kept as text.
            return create_trial(state=state, value=time_us, user_attrs={**attributes, "config": config.key()})
        return create_trial(
            state=state,
            value=time_us,
            params=dict(config),
            distributions=self._distributions,
            user_attrs=attributes,
        )


def export_studies(studies: Sequence[TuningStudy], path: Path) -> None:
    """Write studies to a new SQLite file that optuna-dashboard opens; the file appears complete or not at all.

    Optuna's SQL storage takes tens of ms a trial.
    Raises TilewrightError when there is nothing to write, two studies share a name, or the file exists or cannot be
    written.
    """
    names = [study.name for study in studies]
    if not studies or len(set(names)) < len(names):
        raise TilewrightError(f"Cannot export studies {names} to {path}: give at least one, each with its own name.")
    if path.exists():
        raise TilewrightError(f"Cannot export to {path}: it exists already; name a new file.")
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        os.close(handle)
        try:
            _write(studies, Path(draft))
            Path(draft).rename(path)
        finally:
            Path(draft).unlink(missing_ok=True)
    except (OSError, SQLAlchemyError, StorageInternalError) as error:
        reason = _root_cause(error)
        raise TilewrightError(f"Cannot export to {path}: {reason}; name a file that can be written.") from error


def _write(studies: Sequence[TuningStudy], path: Path) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    try:
        for study in studies:
            target = optuna.create_study(study_name=study.name, storage=storage)
            for name, value in study.study.user_attrs.items():
                target.set_user_attr(name, value)
            target.add_trials(study.study.get_trials(deepcopy=False))
    finally:
        storage.engine.dispose()


def _root_cause(error: BaseException) -> str:
    """Say in the operating system's or SQLite's words what went wrong; Optuna and SQLAlchemy wrap those in theirs."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class _HandsOver(BaseSampler):
    """The sampler that Optuna asks: it hands over the config that the search chose."""

    # ruff: noqa: ARG002 - the signatures are Optuna's

    def __init__(self) -> None:
        self.config: Mapping[str, Any] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.config[param_name]
