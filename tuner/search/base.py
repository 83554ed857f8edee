"""What every search has in common: which configs are left, which were told, and what to try first."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tilewright.codegen.space import Config, Space

FIRST_FROM_PRIORS = 4
"""Configs of neighbouring problems that are tried before anything else (fewer when the budget is small)."""


class SearchExhausted(Exception):  # noqa: N818 - an expected end and no error
    """Every config of the space was asked for or told: there is nothing left to try."""


@dataclass(frozen=True)
class Prior:
    """Results of a neighbouring problem (another size, another device): its best configs are tried first.

    `results` holds (config, time in us), successes only; configs outside of the searched space have no influence.
    Priors are given nearest neighbour first.
    """

    source: str
    results: tuple[tuple[Config, float], ...]


class Search(Protocol):
    """Chooses which config to try next; it knows times only by `tell`."""

    def ask(self) -> Config:
        """Return a config that was neither asked nor told before; raises SearchExhausted when there is none."""

    def tell(self, config: Mapping[str, Any], time_us: float | None) -> None:
        """Report a config's time, None when it failed; whether it was asked for does not matter."""


class EnumeratedSearch(ABC):
    """A search over the rows of an enumerated space; subclasses choose the row.

    Equal seeds and equal sequences of asks and tells give equal proposals. Several asks may be outstanding.
    """

    def __init__(self, space: Space, *, seed: int, budget: int, priors: Iterable[Prior] = ()) -> None:
        self.space = space
        self.budget = budget
        self._rng = np.random.default_rng(seed)
        self._free = np.ones(len(space), dtype=bool)
        self._free_count = len(space)
        self._told: dict[int, float | None] = {}
        self._pending: set[int] = set()
        self._priors = tuple(priors)
        self._first = _best_of_each(space, self._priors, min(FIRST_FROM_PRIORS, math.ceil(budget / 5)))

    def ask(self) -> Config:
        """Return a config that was neither asked nor told before; raises SearchExhausted when there is none."""
        if not self._free_count:
            raise SearchExhausted(f"all {len(self.space)} configs of the space were tried")
        row = self._next_first()
        if row is None:
            row = self._propose()
        self._take(row)
        self._pending.add(row)
        return self.space[row]

    def tell(self, config: Mapping[str, Any], time_us: float | None) -> None:
        """Report a config's time in us, None when it failed.

        The config need not have been asked for (a resumed run replays its trials); a second tell replaces the first.
        One outside of the space has no influence. Raises ValueError when the time is no positive number.
        """
        if time_us is not None and not (math.isfinite(time_us) and time_us > 0):
            raise ValueError(f"time_us must be a positive number or None, not {time_us!r}")
        row = self.space.find(config)
        if row is None:
            return
        self._take(row)
        self._pending.discard(row)
        self._told[row] = time_us

    @abstractmethod
    def _propose(self) -> int:
        """Choose a free row; there is at least one."""

    def _any_free(self) -> int:
        """Draw a free row, each equally likely."""
        return int(self._rng.choice(np.flatnonzero(self._free)))

    def _take(self, row: int) -> None:
        self._free_count -= int(self._free[row])
        self._free[row] = False

    def _next_first(self) -> int | None:
        while self._first:
            row = self._first.pop(0)
            if self._free[row]:
                return row
        return None


def _best_of_each(space: Space, priors: Sequence[Prior], count: int) -> list[int]:
    """Rows of the priors' best configs, the best of every source before the second best of any; at most `count`."""
    ranked = [sorted(prior.results, key=lambda result: result[1]) for prior in priors]
    rows: list[int] = []
    for place in range(max(map(len, ranked), default=0)):
        for results in ranked:
            row = space.find(results[place][0]) if place < len(results) else None
            if len(rows) < count and row is not None and row not in rows:
                rows.append(row)
    return rows
