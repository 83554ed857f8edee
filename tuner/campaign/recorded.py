"""What the database knows, as Optuna studies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from tilewright.codegen.ops.registry import find_op
from tilewright.tuner.report.text import format_shape
from tilewright.tuning_db.records import ProblemSummary, TrialRecord
from tilewright.tuning_db.store import Store


def recorded_studies(store: Store) -> list[optuna.Study]:
    """One in-memory study for each problem, device and thread count; empty where nothing was tried.

    Values are medians in us. Trials that failed and finalists' last races are in them, and user attributes say so.
    """
    return [_study(summary, _trials(store, summary)) for summary in store.summary()]


def _trials(store: Store, summary: ProblemSummary) -> list[TrialRecord]:
    return store.trials(problem_key=summary.problem_key, device_key=summary.device_key, threads=summary.threads)


def _study(summary: ProblemSummary, trials: Sequence[TrialRecord]) -> optuna.Study:
    problem = find_op(summary.op).problem_from_dict(summary.problem)
    size = f"{problem.signature.size_name}={problem.size}"
    shape = f"{format_shape(problem.signature.to_dict())} {size} threads={summary.threads}"
    # Problems may differ in their routing alone: hence the key.
    name = f"{shape} on {summary.device_key} ({summary.problem_key[:8]})"
    study = optuna.create_study(study_name=name, direction="minimize")
    attributes = {
        "op": summary.op,
        "problem": summary.problem,
        "device": summary.device_key,
        "threads": summary.threads,
        "value": "median_us",
    }
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    distributions = _distributions(trial.config for trial in trials)
    study.add_trials([_frozen(trial, distributions) for trial in trials])
    return study


def _distributions(configs: Iterable[Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    """Per knob, the values that were tried; numbers in ascending order."""
    values: dict[str, dict[Any, None]] = {}
    for config in configs:
        for name, value in config.items():
            values.setdefault(name, {})[value] = None
    return {name: CategoricalDistribution(sorted(found, key=_rank)) for name, found in values.items()}


def _rank(value: Any) -> tuple[str, float, str]:
    number = isinstance(value, int | float)
    return ("number" if number else type(value).__name__, value if number else 0, str(value))


def _frozen(trial: TrialRecord, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    attributes = {
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
    at = datetime.fromtimestamp(trial.created_at, UTC).astimezone().replace(tzinfo=None)
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.FAIL if trial.median_us is None else TrialState.COMPLETE,
        value=trial.median_us,
        datetime_start=at,
        datetime_complete=at,
        params=dict(trial.config),
        distributions={name: distributions[name] for name in trial.config},
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={},
    )
