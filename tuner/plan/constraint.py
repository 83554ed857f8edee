"""Which weight layouts a plan uses, and what the last races say of each size."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.loop import Candidate, ProblemResult, ProblemTuner
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES, TOLERATED, Ratio
from tilewright.tuner.plan.decide import Pairing, preferred, replaces, replaces_overall
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
    standing: int
    """Where it stands among kernels that are as fast: 0 for the default, then the op's starting configs in their order,
    then all others."""

    @property
    def place(self) -> tuple[int, str]:
        """By which kernels that the rule does not tell apart are ordered."""
        return self.standing, self.key

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
    noise: Ratio | None = None
    """A kernel against itself, at this size or the nearest at which that was raced."""

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

    def pairing(self, candidate: Finalist, incumbent: Finalist) -> Pairing:
        """The two in this race."""
        noise = self.noise.noise if self.noise else None
        return Pairing(candidate.samples_us, incumbent.samples_us, noise or 0.0)

    def replaces(self, candidate: Finalist, incumbent: Finalist, *, comparisons: int = 1) -> bool:
        """Whether one takes the other's place at this size: see :func:`tilewright.tuner.plan.decide.replaces`."""
        pairing = self.pairing(candidate, incumbent)
        return replaces(pairing.candidate_us, pairing.incumbent_us, noise=pairing.noise, comparisons=comparisons)

    def slower_than_default(self, finalist: Finalist) -> bool:
        """Whether the default takes its place."""
        return finalist is not self.default and self.replaces(self.default, finalist)


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
    noise: Ratio | None
    """The fastest kernel of the race against itself; None where that was not raced."""


@dataclass(frozen=True)
class _Standing:
    """The best with one constraint at one size."""

    time_us: float
    slower: bool
    """Than the default."""
    standing: int
    """The least of its kernels; see :attr:`Finalist.standing`."""
    best: tuple[Raced, Finalist] | None = None
    """In its last race, where it was in one."""


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
        for candidate in result.ranked():
            if candidate.constraint is not None and precision in (None, candidate.kernel.recipe.precision):
                _enter(
                    standings,
                    candidate.constraint,
                    _Standing(candidate.time_us, candidate.time_us > limit_us, int(candidate is not default)),
                )
        sizes.append(standings)

    def faster(candidate: Sequence[_Standing], incumbent: Sequence[_Standing]) -> bool:
        """Where to search is no matter of proof: the times are of different moments, and the last races settle it."""
        ratios = [mine.time_us / other.time_us for mine, other in zip(candidate, incumbent, strict=True)]
        return geometric_mean(ratios) < 1

    return _pick(sizes, [result.ranked()[0].time_us for result in solved], copies, faster)


def settle(raced: Sequence[Raced], copies: int = 1) -> Settled:
    """What the plan uses: by the last races, not by the search's many short ones.

    A layout with which a size would be clearly slower than the default is taken only if there is no other, and the
    default's is always such another. Another than the default's is taken if its kernels replace those of the
    default's, all sizes taken together.
    """

    def standings(each: Raced, *, ordered: bool) -> dict[PlanConstraint, _Standing]:
        found: dict[PlanConstraint, _Standing] = {}
        for finalist in sorted(each.right, key=lambda finalist: (finalist.median_us, finalist.place)):
            constraint = finalist.constraint if ordered else PlanConstraint(finalist.built.variant.layout_key)
            if constraint is not None:
                slower = each.slower_than_default(finalist)
                _enter(found, constraint, _Standing(finalist.median_us, slower, finalist.standing, (each, finalist)))
        return found

    best_us = [each.best.median_us for each in raced]
    kept = [standings(each, ordered=True) for each in raced]
    constraints = _pick(kept, best_us, copies, _replace_in_races)
    if not constraints:
        return Settled((), 1.0)
    settled = priced(constraints, raced)
    more = _pick(kept, best_us, copies + 1, _replace_in_races)
    if len(more) > len(constraints):
        settled = replace(settled, another=priced(more, raced))
    if not settled.order:
        return settled
    free = [standings(each, ordered=False) for each in raced]
    free_constraints = _pick(free, best_us, copies, _replace_in_races)
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


def noise_near(raced: Sequence[Raced], size: int) -> Ratio | None:
    """A kernel against itself at the nearest size, by ratio, at which that is known; None where it is nowhere."""
    known = [each for each in raced if each.noise is not None]
    nearest = min(known, key=lambda each: max(each.size / size, size / each.size), default=None)
    return nearest.noise if nearest else None


def race_configs(
    tuner: ProblemTuner, configs: Sequence[Config], budget_s: float, starts: Sequence[Config] = ()
) -> Raced | None:
    """Race ``configs`` and the default; None when the default was not right.

    ``starts`` are the op's starting configs, which come before others that are as fast.
    """
    result = tuner.result
    raced = tuner.race_again(list(dict.fromkeys([*configs, result.default])), budget_s)
    standings = {config: 1 + place for place, config in enumerate(starts)} | {result.default: 0}
    right = tuple(
        Finalist(built, evaluation, standings.get(built.variant.config, 1 + len(starts)))
        for built, evaluation in raced
        if evaluation.outcome is Outcome.OK
    )
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


def _enter(standings: dict[PlanConstraint, _Standing], constraint: PlanConstraint, standing: _Standing) -> None:
    """Note the next fastest kernel with ``constraint``: the first one is its best, and all say where it stands."""
    first = standings.setdefault(constraint, standing)
    standings[constraint] = replace(first, standing=min(first.standing, standing.standing))


def _replace_in_races(candidate: Sequence[_Standing], incumbent: Sequence[_Standing]) -> bool:
    """Whether kernels, one at each size, replace others by the races in which they met."""
    pairings = []
    for mine, other in zip(candidate, incumbent, strict=True):
        if mine.best is not None and other.best is not None:
            raced, finalist = mine.best
            pairings.append(raced.pairing(finalist, other.best[1]))
    return replaces_overall(pairings)


def _pick(
    sizes: Sequence[Mapping[PlanConstraint, _Standing]],
    best_us: Sequence[float],
    copies: int,
    faster: Callable[[Sequence[_Standing], Sequence[_Standing]], bool],
) -> tuple[PlanConstraint, ...]:
    """The best constraint, then, up to ``copies`` of one order, those that are worth their memory.

    ``faster`` decides between those that leave as few sizes without a kernel, and as few slower than the default, from
    the best of each at the sizes that both have.
    """

    def fastest(constraints: tuple[PlanConstraint, ...]) -> list[_Standing | None]:
        served = [[each[constraint] for constraint in constraints if constraint in each] for each in sizes]
        return [min(some, key=lambda s: s.time_us) if some else None for some in served]

    def flaws(constraints: tuple[PlanConstraint, ...]) -> tuple[int, int]:
        served = fastest(constraints)
        return served.count(None), sum(mine.slower for mine in served if mine)

    def cost(constraints: tuple[PlanConstraint, ...]) -> float:
        served = zip(fastest(constraints), best_us, strict=True)
        return geometric_mean([mine.time_us / best for mine, best in served if mine])

    def displaces(candidate: tuple[PlanConstraint, ...], incumbent: tuple[PlanConstraint, ...]) -> bool:
        mine, others = flaws(candidate), flaws(incumbent)
        if mine != others:
            return mine < others
        both = [(a, b) for a, b in zip(fastest(candidate), fastest(incumbent), strict=True) if a and b]
        return faster([a for a, _ in both], [b for _, b in both])

    def place(constraint: PlanConstraint) -> tuple[int, PlanConstraint]:
        return min(each[constraint].standing for each in sizes if constraint in each), constraint

    known = sorted({constraint for each in sizes for constraint in each}, key=place)
    if not known:
        return ()
    singles: list[tuple[PlanConstraint, ...]] = [(constraint,) for constraint in known]
    picked = preferred(singles, displaces)
    while len(picked) < copies:
        others = [c for c in known if c not in picked and c.order == picked[0].order]
        if not others:
            break
        more = preferred([(*picked, constraint) for constraint in others], displaces)
        if (*flaws(more), cost(more)) >= (*flaws(picked), cost(picked) * (1 - _WORTH_A_COPY)):
            break
        picked = more
    return picked
