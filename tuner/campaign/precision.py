"""What storing weights in fewer bits costs and brings: errors, a budget for them, and a front of time against error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import create_trial

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.problem import Problem
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.loop import ProblemResult
from tilewright.tuner.campaign.variants import PlanConstraint
from tilewright.tuner.evaluation.checking import PrecisionError
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.plan.constraint import Final, choose_constraints
from tilewright.tuner.search.storage import open_storage, saying_where
from tilewright.tuning_db.records import PlanRecord

DEFAULT_MAX_ERROR = 0.01


@dataclass(frozen=True)
class FrontPoint:
    """One precision of a signature's weights, in its best layout, as the last race saw it."""

    precision: str
    error: PrecisionError
    """The largest over the tuned sizes."""
    finals: tuple[Final, ...]
    plan: PlanRecord

    @property
    def time_us(self) -> float:
        """Geometric mean over the tuned sizes."""
        times = [final.winner_us.median_us or math.inf for final in self.finals]
        return math.exp(sum(map(math.log, times)) / len(times))


def storable(precisions: Sequence[str], refusals: Mapping[str, str | None], say: Callable[[str], None]) -> list[str]:
    """Those of ``precisions`` that a signature's weights can be stored in, the lossless one always among them.

    Args:
        precisions: names.
        refusals: of the op for this signature: known precisions, each with why it is impossible or None.
        say: told of each that is left out.

    Raises:
        TilewrightError: when a precision is none of the op's, or none that was asked for is possible.

    """
    if unknown := [name for name in precisions if name not in refusals and name != LOSSLESS]:
        if not refusals:
            raise TilewrightError(
                f"--precision {unknown[0]} is of weights, and this op has none to store; leave it out"
            )
        known = ", ".join(refusals)
        raise TilewrightError(f"--precision {unknown[0]} is nothing that this op stores weights in; it knows {known}")
    possible = []
    for name in precisions:
        if refusal := refusals.get(name):
            say(f"left out: {refusal}")
        else:
            possible.append(name)
    if not possible:
        raise TilewrightError(f"--precision {','.join(precisions)} is impossible here: {refusals[precisions[0]]}")
    return list(dict.fromkeys([LOSSLESS, *possible]))


def admit(
    evaluator: Evaluator,
    problems: Sequence[Problem],
    precisions: Sequence[str],
    max_error: float,
    say: Callable[[str], None],
) -> dict[str, PrecisionError]:
    """Precisions whose error is within ``max_error`` on every problem, with the largest that it brings."""
    admitted = {}
    for name in precisions:
        each = [evaluator.precision_error(problem, name) for problem in problems]
        worst = PrecisionError(max(e.relative for e in each), max(e.largest for e in each))
        if worst.relative <= max_error or name == LOSSLESS:
            admitted[name] = worst
        else:
            say(f"precision {name} is off by {worst.relative:.2g}, more than --max-error {max_error:g}: left out")
    return admitted


def constraint_by_precision(results: Sequence[ProblemResult]) -> dict[str, PlanConstraint]:
    """The best constraint of every precision that some kernel reads weights in."""
    names = dict.fromkeys(c.kernel.recipe.precision for result in results for c in result.candidates.values())
    chosen = {name: choose_constraints(results, precision=name) for name in names}
    return {name: constraints[0] for name, constraints in chosen.items() if constraints}


def left_out(admitted: Iterable[str], points: Sequence[FrontPoint], chosen: Sequence[FrontPoint]) -> list[str]:
    """Why those of ``admitted`` precisions that no point of the front ``chosen`` from ``points`` uses have no plan."""
    planned, raced = ({name for p in some for name in p.precision.split("+")} for some in (chosen, points))
    unraced = "no kernel was tried and right at every size; more --trials may find one"
    beaten = "another one is as exact and as fast"
    return [
        f"precision {name} gets no plan: {beaten if name in raced else unraced}"
        for name in admitted
        if name not in planned
    ]


def front(points: Iterable[FrontPoint], name: str | None = None, url: str = "") -> list[FrontPoint]:
    """Points that no other one beats in both time and error, by rising error: the best of a study of two objectives.

    Args:
        points: of one signature; of those that are equal in both, the first counts.
        name: of the study; None for any.
        url: where Optuna's tools can look at it; see :func:`tilewright.tuner.search.storage.open_storage`.

    Raises:
        TilewrightError: when the storage fails.

    """
    by_values: dict[tuple[float, float], FrontPoint] = {}
    for point in points:
        by_values.setdefault((point.error.relative, point.time_us), point)
    with saying_where(url):
        study = optuna.create_study(
            study_name=name, storage=open_storage(url), directions=[StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["relative error", "geometric mean us"])
        for values, point in by_values.items():
            study.add_trial(create_trial(values=list(values), user_attrs={"precision": point.precision}))
        best = [by_values[error, time_us] for error, time_us in (trial.values for trial in study.best_trials)]
    return sorted(best, key=lambda point: point.error.relative)
