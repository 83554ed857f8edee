"""Few kernels for many sizes: which ones, who serves where, and what that costs. Decisions alone; nothing is run."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tilewright.tuner.campaign.variants import PlanConstraint
from tilewright.tuner.evaluation.statistics import TOLERATED, clearly_slower, paired_ratio
from tilewright.tuner.plan.constraint import Finalist, Raced, geometric_mean

_NOISY = 0.05
"""By which a kernel's median may be off where the noise does not tell it from the best."""
_WORTH_A_SWITCH = 0.01
"""Of the time at one size, that another kernel must save there: fewer switches are fewer places to be wrong at."""


def equals_best(finalist: Finalist, best: Finalist) -> bool:
    """Whether the race does not tell the two apart, or hardly."""
    loss = finalist.median_us / best.median_us - 1
    if loss <= TOLERATED:
        return True
    return loss <= _NOISY and not clearly_slower(finalist.samples_us, best.samples_us, 0.0)


def distil(grid: Sequence[Raced], constraints: Collection[PlanConstraint]) -> list[str]:
    """Keys of few kernels of which one is as good as the best at every size of ``grid``.

    Greedy: the next kernel is the one that is as good as the best at most of the sizes that are left, and of several
    such ones that which loses least over all sizes where it was raced.
    """
    points = {each.size: each.with_constraints(constraints) for each in grid if each.with_constraints(constraints)}
    good = {size: {f.key for f in ranked if equals_best(f, ranked[0])} for size, ranked in points.items()}
    loss: dict[str, float] = {}
    for key in sorted({key for keys in good.values() for key in keys}):
        ratios = [f.median_us / ranked[0].median_us for ranked in points.values() for f in ranked if f.key == key]
        loss[key] = geometric_mean(ratios)
    chosen: list[str] = []
    while left := [size for size, keys in good.items() if not keys & set(chosen)]:
        chosen.append(max(loss, key=lambda key: (sum(key in good[size] for size in left), -loss[key])))
    return chosen


def assign(grid: Sequence[Raced], keys: Collection[str], constraints: Collection[PlanConstraint]) -> list[Finalist]:
    """Who serves at each size of ``grid``: of ``keys``, with as few switches as cost nothing.

    Nobody serves where it was slower than the default, as long as there is a choice; where none of ``keys`` was right,
    the best with ``constraints`` serves.

    Raises:
        ValueError: when nothing with these constraints was right at some size.

    """
    choices: list[list[Finalist]] = []
    for each in grid:
        fitting = each.with_constraints(constraints)
        mine = [f for f in fitting if f.key in keys] or fitting
        choices.append([f for f in mine if not each.slower_than_default(f)] or mine[:1])
        if not choices[-1]:
            raise ValueError(f"nothing serves {each.size}")
    # Shortest path: by size, the least cost of all before it for each choice, with the choice that it came from.
    costs: list[list[tuple[float, int]]] = []
    for position, options in enumerate(choices):
        row = []
        for option in options:
            own = math.log(option.median_us / min(f.median_us for f in options))
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
        ratio = paired_ratio(above.samples_us, below.samples_us)
        if ratio.low <= 1 <= ratio.high:  # they cross here
            return Crossing(self.below, self.above, raced.size, raced.size + 1)
        return Crossing(
            self.below, self.above, *((self.low, raced.size) if ratio.high < 1 else (raced.size, self.high))
        )


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
