"""An Optuna study around a search, so that Optuna's tools (its dashboard above all) can look at a tuning run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tilewright.codegen.space import Config, Space
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
