"""Rows of a plan: from who serves at which size, and with something else around the sizes where that is faster."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tilewright.tuner.plan.constraint import Finalist, Raced
from tilewright.tuning_db.records import PlanEntry


@dataclass(frozen=True)
class Substitute:
    """What serves around a size in place of what was chosen for it."""

    kernel_key: str | None
    """None: plain torch."""
    median_us: float | None = None
    default_us: float | None = None


def plan_entries(
    grid: Sequence[Raced], chosen: Sequence[Finalist], switches: Mapping[int, int], tuned: Collection[int]
) -> tuple[PlanEntry, ...]:
    """Rows of a plan from who serves at each size of an ascending ``grid``.

    ``switches``: for each size of the grid after which another kernel serves, the last size of the one before. A kernel
    that serves at several ``tuned`` sizes has a row for each, which keeps what was measured there.
    """
    entries: list[PlanEntry] = []
    first = 0
    for position, (each, finalist) in enumerate(zip(grid, chosen, strict=True)):
        last = position == len(grid) - 1
        if not last and chosen[position + 1].key == finalist.key:
            continue
        run = grid[first : position + 1]
        witnesses = [point for point in run if point.size in tuned] or [run[0]]
        for witness, following in itertools.zip_longest(witnesses, witnesses[1:]):
            mine = witness.of(finalist.key)
            bound = None if last else switches[each.size]
            entries.append(
                PlanEntry(
                    max_size=bound if following is None else math.isqrt(witness.size * following.size),
                    kernel_key=finalist.key,
                    median_us=mine.evaluation.median_us if mine else None,
                    default_us=witness.default.evaluation.median_us,
                    tuned_size=witness.size,
                )
            )
        first = position + 1
    return tuple(entries)


def substituted(
    entries: Sequence[PlanEntry], sizes: Collection[int], substitutes: Mapping[int, Substitute]
) -> tuple[PlanEntry, ...]:
    """``entries`` with ``substitutes`` around their sizes: halfway, by ratio, to the next of all ``sizes`` raced."""
    ordered = sorted({*sizes, *substitutes})
    ranges = []
    for at, size in enumerate(ordered):
        if size in substitutes:
            low = 0 if at == 0 else math.isqrt(ordered[at - 1] * size)
            high = None if at == len(ordered) - 1 else math.isqrt(size * ordered[at + 1])
            ranges.append((low, high, size))
    cuts = {bound for low, high, _ in ranges for bound in (low, high) if bound}
    bounds = sorted(cuts | {entry.max_size for entry in entries if entry.max_size is not None})
    made: list[PlanEntry] = []
    for bound in (*bounds, None):
        last = math.inf if bound is None else bound
        mine = next((e for e in entries if e.max_size is None or e.max_size >= last), None)
        if mine is None:
            continue
        around = next((s for low, high, s in ranges if low < last <= (math.inf if high is None else high)), None)
        if around is not None:
            other = substitutes[around]
            mine = PlanEntry(bound, other.kernel_key, other.median_us, other.default_us, around)
        mine = replace(mine, max_size=bound)
        if made and replace(made[-1], max_size=bound) == mine:
            made[-1] = mine
        else:
            made.append(mine)
    return tuple(made)
