"""Few kernels for many sizes: which ones, who serves where, and what that costs. Decisions alone; nothing is run."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tilewright.tuner.campaign.variants import PlanConstraint
from tilewright.tuner.plan.constraint import Finalist, Raced, geometric_mean
from tilewright.tuner.plan.decide import preferred, replaces_overall

_WORTH_A_SWITCH = 0.01
"""Of the time at one size, that another kernel must save there: fewer switches are fewer places to be wrong at."""
_MOST_BY_NOISE = 0.08
"""By which the medians of two equal kernels may differ in one race, on the noisiest machines that were seen."""


def as_fast(raced: Raced, finalist: Finalist, best: Finalist, comparisons: int) -> bool:
    """Whether the fastest of a race, which one of ``comparisons`` is by luck, would not take this one's place.

    The less a race knows of a kernel, the less it tells it apart from the best; so what lost more than noise explains,
    and dropped out of the race for it, is never as fast.
    """
    if finalist is best:
        return True
    loss = finalist.median_us / best.median_us - 1
    return loss <= _MOST_BY_NOISE and not raced.replaces(best, finalist, comparisons=comparisons)


def distil(grid: Sequence[Raced], constraints: Collection[PlanConstraint]) -> list[str]:
    """Keys of few kernels of which one is as good as the best at every size of ``grid``.

    Greedy: the next kernel is the one that is as good as the best at most of the sizes that are left. Of several such
    ones it is the first in canonical order (the default, the op's starting configs, the smaller key), unless another
    replaces it by all races in which they met.
    """
    points = {each.size: each for each in grid if each.with_constraints(constraints)}
    asked = _comparisons(grid, constraints)
    good = {size: _good(each, constraints, asked) for size, each in points.items()}
    places: dict[str, tuple[int, str]] = {}
    for finalist in (finalist for some in good.values() for finalist in some):
        places[finalist.key] = min(finalist.place, places.get(finalist.key, finalist.place))

    def displaces(candidate: str, incumbent: str) -> bool:
        met = [
            each.pairing(mine, other)
            for each in points.values()
            if (mine := each.of(candidate)) and (other := each.of(incumbent))
        ]
        return replaces_overall(met)

    chosen: list[str] = []
    while left := [keys for some in good.values() if not (keys := {f.key for f in some}) & set(chosen)]:
        counts = {key: sum(key in keys for keys in left) for key in sorted(places, key=lambda key: places[key])}
        chosen.append(preferred([key for key in counts if counts[key] == max(counts.values())], displaces))
    return chosen


def assign(grid: Sequence[Raced], keys: Collection[str], constraints: Collection[PlanConstraint]) -> list[Finalist]:
    """Who serves at each size of ``grid``: of ``keys``, with as few switches as cost nothing.

    Where the default may serve, another kernel serves if it replaces it; or at a size at which the two are as fast, if
    it does at the sizes below and above, and handing over and back would cost more. Nobody serves where the default
    replaces it, as long as there is a choice; where none of ``keys`` was right, the best with ``constraints`` serves.

    Raises:
        ValueError: when nothing with these constraints was right at some size.

    """
    asked = _comparisons(grid, constraints)
    choices: list[list[Finalist]] = []
    losses: list[list[float]] = []
    for each in grid:
        fitting = each.with_constraints(constraints)
        if not fitting:
            raise ValueError(f"nothing serves {each.size}")
        mine = [f for f in fitting if f.key in keys] or fitting
        if each.default in fitting and each.default not in mine and not any(_proven(each, f, asked) for f in mine):
            mine = [*mine, each.default]
        options = [f for f in mine if not each.slower_than_default(f)] or mine[:1]
        proven = [f for f in options if each.default not in fitting or _proven(each, f, asked)]
        best = (proven or options)[0]
        # In canonical order, so that of ways that cost the same the first one is taken.
        choices.append(sorted(options, key=lambda finalist: finalist.place))
        losses.append([_loss(each, f, best, asked) + (0.0 if f in proven else _WORTH_A_SWITCH) for f in choices[-1]])
    # Shortest path: by size, the least cost of all before it for each choice, with the choice that it came from.
    costs: list[list[tuple[float, int]]] = []
    for position, options in enumerate(choices):
        row = []
        for option, own in zip(options, losses[position], strict=True):
            if position == 0:
                row.append((own, -1))
                continue
            row.append(
                min(
                    (cost + own + (_WORTH_A_SWITCH if before.key != option.key else 0.0), index)
                    for index, (before, (cost, _)) in enumerate(zip(choices[position - 1], costs[-1], strict=True))
                )
            )
        costs.append(row)
    at = min(range(len(costs[-1])), key=lambda index: costs[-1][index])
    path = []
    for options, row in zip(reversed(choices), reversed(costs), strict=True):
        path.append(options[at])
        at = row[at][1]
    return path[::-1]


def cost_of(grid: Sequence[Raced], chosen: Sequence[Finalist], constraints: Collection[PlanConstraint]) -> float:
    """Geometric mean of the times of who serves, against the best with the same constraints at each size."""
    pairs = zip(grid, chosen, strict=True)
    return geometric_mean([mine.median_us / each.with_constraints(constraints)[0].median_us for each, mine in pairs])


def _comparisons(grid: Sequence[Raced], constraints: Collection[PlanConstraint]) -> int:
    """How many kernels with ``constraints`` challenge the default, at all sizes together; at least one."""
    return max(1, sum(f is not each.default for each in grid for f in each.with_constraints(constraints)))


def _proven(raced: Raced, finalist: Finalist, comparisons: int) -> bool:
    """Whether it is the default, or replaces it at this size."""
    return finalist is raced.default or raced.replaces(finalist, raced.default, comparisons=comparisons)


def _good(raced: Raced, constraints: Collection[PlanConstraint], comparisons: int) -> list[Finalist]:
    """Those that may serve and are as fast as the best of them, fastest first; of at least one with ``constraints``."""
    fitting = raced.with_constraints(constraints)
    may_serve = [f for f in fitting if raced.default not in fitting or _proven(raced, f, comparisons)]
    return [f for f in may_serve if as_fast(raced, f, may_serve[0], comparisons)]


def _loss(raced: Raced, finalist: Finalist, best: Finalist, comparisons: int) -> float:
    """Log of how much slower than ``best`` a kernel is; 0 where the race does not tell them apart."""
    return 0.0 if as_fast(raced, finalist, best, comparisons) else math.log(finalist.median_us / best.median_us)


@dataclass(frozen=True)
class Crossing:
    """Where one kernel begins to be faster than another, between two sizes at which it was measured which is."""

    below: str
    above: str
    low: int
    """Largest size known at which the one below serves."""
    high: int
    """Smallest size known at which the one above serves."""

    @property
    def middle(self) -> int | None:
        """Where to look next; None where nothing lies between, or it makes no difference any more."""
        middle = math.isqrt(self.low * self.high)
        return middle if middle > self.low and self.high > 1.3 * self.low else None

    @property
    def last_below(self) -> int:
        """The last size that the one below serves."""
        return max(self.low, min(math.isqrt(self.low * self.high), self.high - 1))

    def narrowed(self, raced: Raced) -> Crossing:
        """With what a race of the two in the middle says; within the noise of each other, both do up to there."""
        below, above = raced.of(self.below), raced.of(self.above)
        if below is None or above is None:
            return Crossing(self.below, self.above, *((raced.size, self.high) if below else (self.low, raced.size)))
        if raced.replaces(above, below):
            return Crossing(self.below, self.above, self.low, raced.size)
        if raced.replaces(below, above):
            return Crossing(self.below, self.above, raced.size, self.high)
        return Crossing(self.below, self.above, raced.size, raced.size + 1)  # they cross here


def sizes_between(sizes: Sequence[int]) -> list[int]:
    """The geometric mean of each two neighbours among ascending ``sizes``, where it is neither of them."""
    means = [(math.isqrt(below * above), below) for below, above in itertools.pairwise(sizes)]
    return [mean for mean, below in means if mean > below]


def probe_sizes(largest: int, known: Collection[int], count: int, draw: random.Random) -> list[int]:
    """Sizes in [1, largest] that are not ``known``, ascending; drawn so that every octave is as likely as any other."""
    unknown = [size for size in range(1, largest + 1) if size not in known]
    drawn: set[int] = set()
    while len(drawn) < min(count, len(unknown)):
        size = round(math.exp(draw.uniform(0, math.log(largest))))
        if size not in known:
            drawn.add(size)
    return sorted(drawn)
