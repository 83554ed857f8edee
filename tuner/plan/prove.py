"""A frozen plan put to the test: served as it is stored, at sizes drawn at random and with fresh data.

It is raced against the default and plain torch. Where one of them is faster beyond the noise, it serves around that
size instead, and the mended plan is put to the test again, at further sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilewright import disks
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.temporary import temporary_folder
from tilewright.tuner.evaluation.cpu.weights import declared_bytes
from tilewright.tuner.plan.deployed import Deployed, DeployedRaces, RaceLost
from tilewright.tuner.plan.distil import probe_sizes
from tilewright.tuner.plan.entries import Substitute, substituted
from tilewright.tuning_db.pack import write_pack
from tilewright.tuning_db.records import PlanEntry, PlanRecord
from tilewright.tuning_db.store import Store

ROUNDS = 3
"""Most rounds of probes: after one that finds the plan slower, it is mended, and fresh sizes are probed."""
_MEMORY_SHARE = 0.6
"""Of this machine's memory, that three copies of the weights may take."""
_FRESH_SEED = 7919
"""Between the seeds of rounds, so that none repeats the data of the search or of another round."""


@dataclass(frozen=True)
class Default:
    """The default config's kernel, which is in the store."""

    kernel_key: str
    layout: str
    joins: bool
    """Whether the plan may use it, too: it shares the plan's weight layout, and order of sums where there is one."""


@dataclass(frozen=True)
class Mend:
    """What serves around a size since a race there found it faster: ``torch``, ``default`` or ``tuned``."""

    size: int
    by: str


@dataclass(frozen=True)
class Proof:
    """How a plan stood the test, and what it became by it."""

    plan: PlanRecord
    rows: tuple[Deployed, ...] = ()
    """The last race at every size, ascending."""
    rounds: tuple[tuple[int, ...], ...] = ()
    """Sizes that were drawn, round by round; the plan was the same in the last one as it is now."""
    mends: tuple[Mend, ...] = ()

    @property
    def last(self) -> tuple[Deployed, ...]:
        """Races at the sizes drawn last: of the plan as it is."""
        drawn = self.rounds[-1] if self.rounds else ()
        return tuple(row for row in self.rows if row.size in drawn)

    @property
    def slower_than_default(self) -> tuple[Deployed, ...]:
        """Races in which the default was faster, beyond the noise, than what serves there now."""
        return tuple(row for row in self.still_served if row.slower_than_default)

    @property
    def still_served(self) -> tuple[Deployed, ...]:
        """Races of what serves there now."""
        return tuple(row for row in self.rows if row.kernel_key == _serving(self.plan.entries, row.size))

    @property
    def drawn(self) -> int:
        """Sizes drawn in all rounds."""
        return sum(map(len, self.rounds))


class Prover:
    """Puts plans of one op to the test.

    Args:
        op: the op.
        store: holds the kernels of the plans.
        races: in which plans are raced.
        threads: of a call.
        seed: of the sizes and of all data.
        budget_s: wall seconds for the races of the first round.
        say: told of what is raced and mended.

    """

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        store: Store,
        races: DeployedRaces,
        *,
        threads: int,
        seed: int,
        budget_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._op = op
        self._store = store
        self._races = races
        self._threads = threads
        self._seed = seed
        self._budget_s = budget_s
        self._say = say

    def prove(
        self,
        plan: PlanRecord,
        grid: Sequence[Problem],
        default: Default,
        probes: int,
        noise_at: Callable[[int], float] = lambda _size: 0.0,
    ) -> Proof:
        """Race ``plan`` at the problems of ``grid``, on which it rests, and at ``probes`` fresh sizes; mend it.

        The first round races both, later ones what was mended and fresh sizes. The plan that comes out is not stored.
        ``noise_at`` says what becomes of two equal times at a size: what is faster by less mends nothing.
        """
        draw = random.Random(self._seed + _FRESH_SEED)
        known = {problem.size for problem in grid}
        largest = max(known)
        rows: dict[int, Deployed] = {}
        substitutes: dict[int, Substitute] = {}
        rounds: list[tuple[int, ...]] = []
        mends: list[Mend] = []
        todo, base, count = list(grid), plan.entries, len(grid) + probes
        for round_ in range(ROUNDS):
            fresh = probe_sizes(largest, known, probes, draw)
            known |= set(fresh)
            problems = [*todo, *(grid[0].with_size(size) for size in fresh)]
            try:
                raced = self._race(plan, problems, default, round_, self._budget_s * len(problems) / count)
            except RaceLost as lost:
                self._say(f"the plan could not be raced as it is served: {lost}")
                break
            raced = [
                replace(row, noise=noise_at(row.size), kernel_key=_serving(plan.entries, row.size)) for row in raced
            ]
            rounds.append(tuple(fresh))
            rows |= {row.size: row for row in raced}
            mended = [] if round_ == ROUNDS - 1 else self._mend(plan, base, raced, default, substitutes)
            if not mended:
                break
            self._say(", ".join(f"{each.by} serves around {each.size}" for each in mended) + ", being faster there")
            mends += mended
            plan = replace(plan, entries=substituted(base, rows, substitutes))
            if not probes:
                break
            sizes = {each.size for each in mended}
            todo = [problem for problem in problems if problem.size in sizes]
        return Proof(plan, tuple(rows[size] for size in sorted(rows)), tuple(rounds), tuple(mends))

    def _mend(
        self,
        plan: PlanRecord,
        base: Sequence[PlanEntry],
        raced: Sequence[Deployed],
        default: Default,
        substitutes: dict[int, Substitute],
    ) -> list[Mend]:
        """Choose what serves around sizes at which the plan is slower beyond the noise, where there is a choice."""
        mended = []
        for row in raced:
            if not (row.slower_than_torch or row.slower_than_default):
                continue
            if found := mend_for(row, default, batch_invariant=plan.batch_invariant):
                mend, substitute = found
                substitutes[row.size] = substitute
                mended.append(mend)
            elif _serving(plan.entries, row.size) != _serving(base, row.size):
                # Torch had come to serve here from the next size, and is slower than the default.
                substitutes[row.size] = Substitute(_serving(base, row.size))
                mended.append(Mend(row.size, "tuned"))
        return mended

    def _race(
        self, plan: PlanRecord, problems: Sequence[Problem], default: Default, round_: int, budget_s: float
    ) -> list[Deployed]:
        with disks.writing(disks.TEMPORARY), temporary_folder() as folder:
            served, by_default = Path(folder, "served.pack"), Path(folder, "default.pack")
            write_pack(self._store, [plan], served)
            weights = declared_bytes(problems[0].signature.tensors())
            room = 3 * weights <= _MEMORY_SHARE * read_cpu_info().memory_bytes
            if room:
                write_pack(self._store, [_plan_of(default, plan)], by_default)
            else:
                self._say("the memory holds no third copy of the weights, so that the default is left out")
            return self._races.race(
                problems,
                served=served,
                default=by_default if room else None,
                threads=self._threads,
                seed=(self._seed + _FRESH_SEED * (round_ + 1)) % 2**32,
                budget_s=budget_s,
                max_error=plan.error,
                batch_invariant=plan.batch_invariant,
            )


def mend_for(row: Deployed, default: Default, *, batch_invariant: bool) -> tuple[Mend, Substitute] | None:
    """What is to serve around a size in place of what did in a race there; None: nothing that may is faster.

    Of the default and torch, where both are faster than what was served, it is torch only if torch replaces the default
    as well. Torch adds up in other orders for other batches, so that it has no part in a ``batch_invariant`` plan.
    """
    default_us = row.default.median if row.default else None
    by_default = default.joins and row.slower_than_default
    if row.slower_than_torch and not batch_invariant and (not by_default or row.torch_beats_default):
        return Mend(row.size, "torch"), Substitute(None, row.torch.median, default_us)
    if by_default:
        return Mend(row.size, "default"), Substitute(default.kernel_key, default_us, default_us)
    return None


def _serving(entries: Sequence[PlanEntry], size: int) -> str | None:
    """Key of the kernel that serves ``size``; None for torch."""
    return next(entry.kernel_key for entry in entries if entry.max_size is None or size <= entry.max_size)


def _plan_of(default: Default, plan: PlanRecord) -> PlanRecord:
    """The default at all sizes, as if it were a plan."""
    return replace(
        plan,
        layout=default.layout,
        entries=(PlanEntry(None, default.kernel_key),),
        precision=LOSSLESS,
        error=0.0,
        batch_invariant=False,
        facts={},
    )
