"""Which weight layouts a plan uses, and what the last races say of each size."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Problem
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.loop import Candidate, ProblemResult, ProblemTuner
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES, TOLERATED, Ratio, clearly_slower
from tilewright.tuning_db.records import Outcome

_WORTH_A_COPY = 0.02
"""Of the time over all sizes, that another copy of the weights must save."""


@dataclass(frozen=True)
class Settled:
    """What the kernels of a plan may share, and what the restriction costs."""

    constraints: tuple[PlanConstraint, ...]
    """One, unless more copies of the weights are allowed; all of one order."""
    cost: float
    """Geometric mean, over the tuned sizes, of the best time with these constraints against the best time with any."""
    order_cost: float = 1.0
    """The same against as many weight layouts with any order of sums."""
    another: Settled | None = None
    """With one more weight layout; None where that is not worth its memory."""

    @property
    def layout(self) -> str:
        """The weight layouts."""
        return "+".join(dict.fromkeys(constraint.layout for constraint in self.constraints))

    @property
    def order(self) -> str:
        """The order of sums; empty where results may depend on the batch."""
        return self.constraints[0].order


@dataclass(frozen=True)
class Finalist:
    """A kernel in a last race of a problem."""

    built: BuildResult
    evaluation: Evaluation

    @property
    def key(self) -> str:
        """Of the kernel."""
        return self.built.variant.key

    @property
    def constraint(self) -> PlanConstraint | None:
        """What it would share with others."""
        return self.built.variant.constraint

    @property
    def samples_us(self) -> NDArray[np.float64]:
        """Of the race, in order. A prediction is the same every time, and so are its samples."""
        if self.evaluation.timing == "predicted":
            return np.full(MIN_SAMPLES, self.median_us)
        return np.asarray(self.evaluation.samples_us)

    @property
    def median_us(self) -> float:
        """Of the race; infinite when it was never timed."""
        return self.evaluation.median_us or math.inf


@dataclass(frozen=True)
class Raced:
    """A last race at one size: who was right in it, the default among them."""

    problem: Problem
    right: tuple[Finalist, ...]
    default: Finalist

    @property
    def size(self) -> int:
        """Dynamic size of the problem."""
        return self.problem.size

    @property
    def best(self) -> Finalist:
        """The fastest of all."""
        return min(self.right, key=lambda finalist: finalist.median_us)

    def with_constraints(self, constraints: Collection[PlanConstraint]) -> list[Finalist]:
        """Those with one of ``constraints``, fastest first."""
        return sorted((each for each in self.right if each.constraint in constraints), key=lambda each: each.median_us)

    def of(self, kernel_key: str) -> Finalist | None:
        """How one kernel did."""
        return next((each for each in self.right if each.key == kernel_key), None)

    def slower_than_default(self, finalist: Finalist) -> bool:
        """Whether it is slower than the default beyond the noise."""
        return clearly_slower(finalist.samples_us, self.default.samples_us, TOLERATED)


@dataclass(frozen=True)
class Final:
    """The verdict on one tuned size."""

    problem: Problem
    winner: BuildResult
    winner_us: Evaluation
    default: BuildResult
    default_us: Evaluation
    speedup: Ratio
    """Default's time over the winner's."""
    noise: Ratio
    """The winner against itself."""


@dataclass(frozen=True)
class _Standing:
    """The best with one constraint at one size."""

    time_us: float
    slower: bool
    """Than the default."""


def choose_constraints(
    results: Sequence[ProblemResult], copies: int = 1, precision: str | None = None
) -> tuple[PlanConstraint, ...]:
    """What to search on in, of one precision if named; empty where no problem has a candidate.

    Those come first with which every problem has a candidate, then those with which none is slower than the default,
    then those with which the sizes together lose least. ``copies`` layouts at the most, each of which must be worth it.
    """
    solved = [result for result in results if result.candidates]
    sizes = []
    for result in solved:
        default = result.candidates.get(result.default)
        limit_us = default.time_us * (1 + TOLERATED) if default else math.inf
        standings: dict[PlanConstraint, _Standing] = {}
        for candidate in reversed(result.ranked()):
            if candidate.constraint is not None and precision in (None, candidate.kernel.recipe.precision):
                standings[candidate.constraint] = _Standing(candidate.time_us, candidate.time_us > limit_us)
        sizes.append(standings)
    return _pick(sizes, [result.ranked()[0].time_us for result in solved], copies)


def settle(raced: Sequence[Raced], copies: int = 1) -> Settled:
    """What the plan uses: by the last races, not by the search's many short ones.

    A layout with which a size would be clearly slower than the default is taken only if there is no other, and the
    default's is always such another.
    """

    def standings(each: Raced, *, ordered: bool) -> dict[PlanConstraint, _Standing]:
        found: dict[PlanConstraint, _Standing] = {}
        for finalist in sorted(each.right, key=lambda finalist: -finalist.median_us):
            constraint = finalist.constraint if ordered else PlanConstraint(finalist.built.variant.layout_key)
            if constraint is not None:
                found[constraint] = _Standing(finalist.median_us, each.slower_than_default(finalist))
        return found

    best_us = [each.best.median_us for each in raced]
    constraints = _pick([standings(each, ordered=True) for each in raced], best_us, copies)
    if not constraints:
        return Settled((), 1.0)
    settled = priced(constraints, raced)
    more = _pick([standings(each, ordered=True) for each in raced], best_us, copies + 1)
    if len(more) > len(constraints):
        settled = replace(settled, another=priced(more, raced))
    if not settled.order:
        return settled
    free = [standings(each, ordered=False) for each in raced]
    free_constraints = _pick(free, best_us, copies)
    ratios = [
        mine[0].median_us / min(each[constraint].time_us for constraint in free_constraints if constraint in each)
        for mine, each in zip([each.with_constraints(constraints) for each in raced], free, strict=True)
        if mine and any(constraint in each for constraint in free_constraints)
    ]
    return replace(settled, order_cost=geometric_mean(ratios))


def priced(constraints: Sequence[PlanConstraint], raced: Sequence[Raced]) -> Settled:
    """The constraints with what they cost in the last races."""
    losses = [mine[0].median_us / each.best.median_us for each in raced if (mine := each.with_constraints(constraints))]
    return Settled(tuple(constraints), geometric_mean(losses))


def race_configs(tuner: ProblemTuner, configs: Sequence[Config], budget_s: float) -> Raced | None:
    """Race ``configs`` and the default; None when the default was not right."""
    result = tuner.result
    raced = tuner.race_again(list(dict.fromkeys([*configs, result.default])), budget_s)
    right = tuple(Finalist(*pair) for pair in raced if pair[1].outcome is Outcome.OK)
    default = next((finalist for finalist in right if finalist.built.variant.config == result.default), None)
    return None if default is None else Raced(result.problem, right, default)


def kept(result: ProblemResult, count: int) -> list[Candidate]:
    """Candidates that the database keeps as kernels: the fastest few and the default."""
    fastest = result.finalists(count)
    default = result.candidates.get(result.default)
    return fastest if default is None or default in fastest else [*fastest, default]


def geometric_mean(ratios: Sequence[float]) -> float:
    """1 for none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0


def _pick(
    sizes: Sequence[Mapping[PlanConstraint, _Standing]], best_us: Sequence[float], copies: int
) -> tuple[PlanConstraint, ...]:
    """The best constraint, then, up to ``copies`` of one order, those that are worth their memory."""

    def loss(constraints: tuple[PlanConstraint, ...]) -> tuple[int, int, float]:
        served = [[each[constraint] for constraint in constraints if constraint in each] for each in sizes]
        fastest = [min(some, key=lambda s: s.time_us) if some else None for some in served]
        ratios = [mine.time_us / best for mine, best in zip(fastest, best_us, strict=True) if mine]
        return fastest.count(None), sum(mine.slower for mine in fastest if mine), geometric_mean(ratios)

    known = sorted({constraint for each in sizes for constraint in each})
    if not known:
        return ()
    picked: tuple[PlanConstraint, ...] = (min(known, key=lambda constraint: loss((constraint,))),)
    while len(picked) < copies:
        others = [
            constraint for constraint in known if constraint not in picked and constraint.order == picked[0].order
        ]
        better = min(((*picked, constraint) for constraint in others), key=loss, default=picked)
        missing, slower, cost = loss(picked)
        if loss(better) >= (missing, slower, cost * (1 - _WORTH_A_COPY)):
            break
        picked = better
    return picked
