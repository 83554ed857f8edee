"""Our trials as Optuna's: those of a search that goes on, and everything that the database knows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.tuner.report.text import format_shape
from tilewright.tuner.search.encoding import distribution_of
from tilewright.tuning_db.records import Outcome, ProblemSummary, TrialRecord
from tilewright.tuning_db.store import Store


def state_of(outcome: Outcome, value: float | None) -> TrialState:
    """What Optuna calls it: pruned is what was given up before it could run, failed what has no value otherwise."""
    if outcome == Outcome.REJECTED:
        return TrialState.PRUNED
    return TrialState.FAIL if value is None else TrialState.COMPLETE


def attributes_of(trial: TrialRecord) -> dict[str, Any]:
    """User attributes of a trial's twin in a study."""
    return {
        "outcome": trial.outcome.value,
        "message": trial.message,
        "kernel": trial.kernel_key,
        "run": trial.run_id,
        "search": trial.search,
        "seed": trial.seed,
        "low_us": trial.low_us,
        "high_us": trial.high_us,
        "samples": len(trial.samples_us),
        # Browsers read no infinity in JSON.
        "error": trial.error if trial.error is None or math.isfinite(trial.error) else str(trial.error),
        "build_s": trial.build_s,
    }


def study_attributes(problem: Problem, op: str, device_key: str, threads: int) -> dict[str, Any]:
    """User attributes of a problem's study."""
    return {
        "op": op,
        "problem": problem.to_dict(),
        "device": device_key,
        "threads": threads,
        "value": "median_us",
    }


def study_title(problem: Problem, device_key: str, threads: int) -> str:
    """What the study of a problem is called; problems may differ in their routing alone, hence the key in it."""
    size = f"{problem.signature.size_name}={problem.size}"
    shape = f"{format_shape(problem.signature.to_dict())} {size} threads={threads}"
    return f"{shape} on {device_key} ({problem.key[:8]})"


def finished_trial(
    trial: TrialRecord,
    value: float | None,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
) -> FrozenTrial:
    """Return a trial's twin for :meth:`optuna.Study.add_trial`; ``value`` is its time in us, None where it failed."""
    at = datetime.fromtimestamp(trial.created_at, UTC).astimezone().replace(tzinfo=None)
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=state_of(trial.outcome, value),
        value=value,
        datetime_start=at,
        datetime_complete=at,
        params=dict(params),
        distributions={name: distributions[name] for name in params},
        user_attrs=attributes_of(trial),
        system_attrs={},
        intermediate_values={},
    )


def recorded_studies(store: Store) -> list[optuna.Study]:
    """One in-memory study for each problem, device and thread count; empty where nothing was tried.

    Values are medians in us. Trials that failed and finalists' last races are in them, and user attributes say so.
    """
    return [_study(summary, _trials(store, summary)) for summary in store.summary()]


def _trials(store: Store, summary: ProblemSummary) -> list[TrialRecord]:
    return store.trials(problem_key=summary.problem_key, device_key=summary.device_key, threads=summary.threads)


def _study(summary: ProblemSummary, trials: Sequence[TrialRecord]) -> optuna.Study:
    problem = find_op(summary.op).problem_from_dict(summary.problem)
    study = optuna.create_study(study_name=study_title(problem, summary.device_key, summary.threads))
    for key, value in study_attributes(problem, summary.op, summary.device_key, summary.threads).items():
        study.set_user_attr(key, value)
    distributions = _distributions(trial.config for trial in trials)
    study.add_trials([finished_trial(trial, trial.median_us, trial.config, distributions) for trial in trials])
    return study


def _distributions(configs: Iterable[Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    """Per knob, over the values that were tried."""
    values: dict[str, dict[Any, None]] = {}
    for config in configs:
        for name, value in config.items():
            values.setdefault(name, {})[value] = None
    return {name: distribution_of(sorted(found, key=_rank)) for name, found in values.items()}


def _rank(value: Any) -> tuple[str, float, str]:
    number = isinstance(value, int | float)
    return ("number" if number else type(value).__name__, value if number else 0, str(value))
