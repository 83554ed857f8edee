"""Which trial speaks for which kernel, and how kernels of one problem rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewright.codegen.space import Config, Space
from tilewright.tuner.campaign.loop import FINAL_RACE
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES
from tilewright.tuning_db.records import Checked, Outcome, ProblemSummary, TrialRecord
from tilewright.tuning_db.store import Store


def right_trials(store: Store, summary: ProblemSummary) -> list[TrialRecord]:
    """Correct trials of a problem on a device with a thread count, in the order in which they were stored.

    Those that were measured; where nothing was, those that were predicted. The two do not compare.
    """
    found = store.trials(
        problem_key=summary.problem_key, device_key=summary.device_key, threads=summary.threads, outcome=Outcome.OK
    )
    measured = [trial for trial in found if trial.timing == "measured"]
    return measured or [trial for trial in found if trial.timing == "predicted"]


def resumable(known: Sequence[TrialRecord], space: Space, variant_builder: VariantBuilder) -> list[TrialRecord]:
    """Those of ``known`` trials, in their order, whose configs are in ``space`` and would make the same kernels today.

    A template or compiler that changed since makes other kernels of the same configs. Knobs that a template got since
    are in the configs of the result, at their default.
    """
    read = [replace(trial, config=dict(space.read(trial.config))) for trial in known]
    keys = {config: variant_builder.variant(config).key for t in read if (config := Config(t.config)) in space}
    return [trial for trial in read if keys.get(Config(trial.config)) == trial.kernel_key]


def checked(trial: TrialRecord) -> Checked:
    """How it is known that a correct trial's kernel is right: an interpreter leaves an error, and a device a time."""
    if trial.timing == "measured":
        return "device"
    return "compiled" if trial.error is None else "emulated"


def standings(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """One trial per kernel, the best kernel first.

    Those that met in the last race of finalists come first, by that race: its times are of one moment and of many
    samples. The fastest of hundreds of short races, each at a moment of its own, is fast by luck as much as by merit.
    """
    finals = [trial for trial in trials if trial.search == FINAL_RACE]
    last = {t.kernel_key: t for t in finals if t.run_id == finals[-1].run_id}
    others: dict[str | None, TrialRecord] = {}
    for trial in sorted(trials, key=_time_us):
        if trial.kernel_key not in last:
            others.setdefault(trial.kernel_key, trial)
    return [*sorted(last.values(), key=_time_us), *others.values()]


def carried_interval(measured: Any) -> tuple[float | None, float | None]:
    """Interval of a time in us, of a trial or of an evaluation; none where samples are too few for one."""
    if 0 < len(measured.samples_us) < MIN_SAMPLES:
        return None, None
    return measured.low_us, measured.high_us


def measured_document(measured: Any) -> dict[str, Any]:
    """What every measured entry of a JSON document says; of a trial or of an evaluation."""
    low_us, high_us = carried_interval(measured)
    return {
        "median_us": measured.median_us,
        "low_us": low_us,
        "high_us": high_us,
        "samples": len(measured.samples_us),
        "error": measured.error,
    }


def _time_us(trial: TrialRecord) -> float:
    return trial.median_us or 0.0
