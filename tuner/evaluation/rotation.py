"""Which data each timed call works on, so that none finds its data in the cache because the last call left it there."""

from __future__ import annotations

import math
from collections.abc import Sequence

_CACHES = 2
"""A rotation touches this many times the last-level cache before it comes back to the same bytes."""
_MAX_SETS = 16


def weight_copies(weight_bytes: int, cache_bytes: int) -> int:
    """Copies of the weights that a rotation needs: one, unless they nearly fit the cache."""
    return _limited(_CACHES * cache_bytes / max(weight_bytes, 1))


def input_sets(touched_bytes: float, cache_bytes: int) -> int:
    """Sets of inputs and outputs in a rotation.

    ``touched_bytes`` is what one call moves: a call for one token reads few experts, and several sets, routed
    differently, reach all of them. At most 16: smaller problems than that stay in the cache in deployment, too.
    """
    return _limited(_CACHES * cache_bytes / max(touched_bytes, 1))


def _limited(wanted: float) -> int:
    return min(_MAX_SETS, max(1, math.ceil(wanted)))


class Rotation:
    """Deals out input sets so that a set comes back only after (nearly) all others."""

    def __init__(self, sets: int) -> None:
        self.sets = sets
        self._next = 0

    def lap(self, contestants: Sequence[int]) -> list[tuple[int, int]]:
        """Calls of one lap, (contestant, set): round by round in the given order, each contestant on every set once."""
        # From one round to the next a contestant's set must move by a step that is coprime to the number of sets.
        step = len(contestants)
        while math.gcd(step, self.sets) != 1:
            step += 1
        calls = []
        for _ in range(self.sets):
            calls += [(contestant, (self._next + i) % self.sets) for i, contestant in enumerate(contestants)]
            self._next += step
        return calls
