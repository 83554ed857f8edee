"""What the database knows of problems like the one that is to be searched, the stronger evidence first."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.space import Space
from tilewright.tuner.search import Prior
from tilewright.tuning_db.records import TIMINGS, Outcome, Timing, TrialRecord
from tilewright.tuning_db.store import Store

PRIOR_CONFIGS = 12
"""Fastest configs of a neighbouring problem that a search is told of."""


def stored_priors(
    store: Store, problem: Problem, space: Space, timing: Timing, *, device_key: str, seen: Collection[str]
) -> Iterator[Prior]:
    """The best configs of other problems of its op on a device, and of this one as far as that is weaker evidence.

    Args:
        store: asked for trials.
        problem: to be searched.
        space: that is searched; it knows what knobs were when a trial was older than they are.
        timing: how the search will know times. Predictions are priors of a search that measures, this problem's own
            among them: each is a prior of its own, marked as predicted.
        device_key: whose trials count.
        seen: keys of problems of which the search is told already.

    """
    for known in reversed(TIMINGS):
        if known == "none":
            continue
        found: dict[str, list[TrialRecord]] = {}
        if TIMINGS.index(known) < TIMINGS.index(timing):
            own = store.trials(problem_key=problem.key, device_key=device_key, outcome=Outcome.OK)
            timed = sorted((t for t in own if t.timing == known), key=lambda t: t.median_us or 0.0)
            found[problem.key] = timed[:PRIOR_CONFIGS]
        for trial in store.neighbours(
            other_than=problem.key,
            timing=known,
            per_problem=PRIOR_CONFIGS,
            op=problem.signature.op,
            device_key=device_key,
        ):
            if trial.problem_key not in seen:
                found.setdefault(trial.problem_key, []).append(trial)
        for key, trials in found.items():
            results = tuple((space.read(trial.config), trial.median_us) for trial in trials if trial.median_us)
            if results:
                yield Prior(key if known == "measured" else f"{key} ({known})", results, known)
