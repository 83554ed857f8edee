"""The last races of a signature: winners at all sizes, between them and where they cross; then probes of the plan."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.loop import ProblemTuner
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.variants import PlanConstraint
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.statistics import Ratio, paired_ratio
from tilewright.tuner.plan.constraint import Final, Finalist, Raced, Settled, noise_near, priced, race_configs, settle
from tilewright.tuner.plan.distil import Crossing, as_fast, assign, cost_of, distil, probe_sizes, sizes_between
from tilewright.tuner.plan.entries import plan_entries
from tilewright.tuning_db.records import CHECKED_LEVELS, TIMINGS, Checked, PlanEntry, Timing

FINALISTS = 3
"""Fastest candidates of a problem, with each constraint in question, that are raced again at their own size."""
_TUNED_SHARE = 0.5
"""Of the time for the finals, for races at the tuned sizes."""
_BETWEEN_SHARE = 0.6
"""Of what is left then, for the sizes between."""
NOISE_RACE_S = 0.5
"""Seconds for the race of a kernel against itself."""
_PROBE_S = 2.5
"""Most seconds for a race between tuned sizes, and for a probe."""
MOST_RACE_S = 6.0
LEAST_RACE_S = 0.8
"""Seconds for a race at a tuned size."""
_STEPS = 2
"""Races that look for one switch."""
_ROUNDS = 3
"""Of probes: after a round that finds something slower, the plan is mended and fresh sizes are probed."""


@dataclass(frozen=True)
class Verdict:
    """Who serves what."""

    settled: Settled
    grid: tuple[Raced, ...]
    """The last race at every size that the plan rests on, ascending."""
    chosen: tuple[Finalist, ...]
    """Who serves at each size of the grid."""
    crossings: tuple[Crossing, ...]
    """Where one of them hands over to the next."""
    finals: tuple[Final, ...]
    """Of the tuned sizes."""
    candidates: int
    """Kernels that won at some tuned size."""

    @property
    def timing(self) -> Timing:
        """The weakest evidence of a time among those that serve."""
        return min((each.evaluation.timing for each in self.chosen), key=TIMINGS.index)

    @property
    def checked(self) -> Checked:
        """How far the least checked of those that serve was checked."""
        return min((each.evaluation.checked for each in self.chosen), key=CHECKED_LEVELS.index)

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        """Rows of the plan."""
        changes = [a.size for a, b, c in zip(self.grid, self.chosen, self.chosen[1:], strict=False) if b.key != c.key]
        switches = {size: crossing.last_below for size, crossing in zip(changes, self.crossings, strict=True)}
        return plan_entries(self.grid, self.chosen, switches, {final.problem.size for final in self.finals})

    @property
    def distilling_cost(self) -> float:
        """Geometric mean of the times of who serves, against the best at each size."""
        return cost_of(self.grid, self.chosen, self.settled.constraints)

    @property
    def sizes(self) -> set[int]:
        """Sizes that had a part in making it."""
        return {each.size for each in self.grid}


@dataclass(frozen=True)
class Probe:
    """What a frozen plan does at a size that had no part in making it."""

    problem: Problem
    kernel_key: str
    speedup: Ratio
    """Default's time over the kernel's."""
    slower: bool
    """Whether the default takes the kernel's place."""


@dataclass(frozen=True)
class Probed:
    """Rounds of probes: each with the plan frozen, the last one with the plan as it is."""

    rounds: tuple[tuple[Probe, ...], ...] = ()

    @property
    def last(self) -> tuple[Probe, ...]:
        """Of the plan as it is."""
        return self.rounds[-1] if self.rounds else ()

    @property
    def mended_sizes(self) -> list[int]:
        """At which an earlier plan was slower than the default."""
        return [probe.problem.size for each in self.rounds[:-1] for probe in each if probe.slower]


class Finals:
    """Runs the last races of one signature.

    Args:
        make_tuner: for a problem; its tuner builds and stores what is raced.
        evaluator: of the signature.
        progress: told of every race.
        copies: of the weights, in as many layouts, that a plan may need.
        until: the moment (monotonic clock) by which all but the probes should be over.
        starts: the op's starting configs, which serve before others that are as fast.
        finalists: fastest candidates of a problem, with each constraint in question, that are raced at its size.
        stop_at: the moment after which no further race begins, whatever is left undecided by that.

    """

    def __init__(
        self,
        make_tuner: Callable[[Problem], ProblemTuner],
        evaluator: Evaluator,
        progress: Progress,
        *,
        copies: int,
        until: float,
        starts: Sequence[Config] = (),
        finalists: int = FINALISTS,
        stop_at: float = math.inf,
    ) -> None:
        self._make_tuner = make_tuner
        self._evaluator = evaluator
        self._progress = progress
        self._copies = copies
        self._until = until
        self._starts = starts
        self._finalists = finalists
        self._stop_at = stop_at
        self._tuned: list[Raced] = []

    def run(self, tuners: Sequence[ProblemTuner], constraints: Sequence[PlanConstraint]) -> Verdict | None:
        """Race the best with every constraint in question, settle which, distil, decide; None: nothing was right."""
        solved = [tuner for tuner in tuners if tuner.result.candidates]
        until = self._share(_TUNED_SHARE)
        for done, tuner in enumerate(solved):
            if time.monotonic() > self._stop_at:
                self._progress.say(f"{tuner.result.problem.title}  is not raced: the time is over")
                continue
            likely = constraints[: self._copies]
            contenders = _contenders(tuner, solved, constraints, likely, self._finalists)
            raced = self._race(tuner, contenders, until, len(solved) - done, MOST_RACE_S)
            if raced is not None:
                best = raced.best.built.kernel
                noise = self._evaluator.measure_noise(best, raced.problem, budget_s=NOISE_RACE_S)
                self._tuned.append(replace(raced, noise=noise))
        self._tuned.sort(key=lambda each: each.size)
        if not self._tuned or not (settled := settle(self._tuned, self._copies)).constraints:
            return None
        tuned = [each for each in self._tuned if each.with_constraints(settled.constraints)]
        winners = _winners(tuned, settled.constraints)
        grid = sorted([*tuned, *self._raced_between(tuned, winners)], key=lambda each: each.size)
        grid = [each for each in grid if each.with_constraints(settled.constraints)]
        candidates = _fastest_kernels(tuned, settled.constraints)
        return self._decided(grid, tuned, settled, distil(grid, settled.constraints), candidates)

    def alternative(self, verdict: Verdict, default: PlanConstraint | None) -> Verdict | None:
        """With the constraint of the ``default``, which may serve then, too; None where it may anyhow, or has none."""
        others = verdict.settled.constraints
        if default is None or default in others:
            return None
        alike = [constraint for constraint in others if constraint.order == default.order]
        return self.within([default, *alike][: self._copies])

    def within(self, constraints: Sequence[PlanConstraint]) -> Verdict | None:
        """What the races of :meth:`run` say of other constraints; None where they leave a size without a kernel."""
        if not all(each.with_constraints(constraints) for each in self._tuned):
            return None
        settled = priced(constraints, self._tuned)
        keys = distil(self._tuned, constraints)
        return self._decided(
            self._tuned, self._tuned, settled, keys, _fastest_kernels(self._tuned, constraints), steps=0
        )

    def probe(self, verdict: Verdict, count: int, seed: int) -> tuple[Verdict, Probed]:
        """Race what the plan serves at ``count`` sizes drawn at random against the default; mend it where it is slower.

        With the mended plan fresh sizes are drawn, at most three rounds in all.
        """
        draw = random.Random(seed)
        rounds: list[tuple[Probe, ...]] = []
        known = verdict.sizes
        for round_ in range(_ROUNDS if count else 0):
            raced = []
            for size in probe_sizes(max(verdict.sizes), known, count, draw):
                known.add(size)
                if (each := self._race_at(verdict, size)) is not None:
                    raced.append(each)
            probes = tuple(probe for each in raced if (probe := _probe(verdict, each)))
            rounds.append(probes)
            slower = {probe.problem.size for probe in probes if probe.slower}
            if not slower or round_ == _ROUNDS - 1:
                break
            self._progress.say(f"slower than the default at {', '.join(map(str, sorted(slower)))}: the plan is mended")
            verdict = self._mended(verdict, [each for each in raced if each.size in slower])
        return verdict, Probed(tuple(rounds))

    def _mended(self, verdict: Verdict, raced: Sequence[Raced]) -> Verdict:
        """The plan with further sizes to rest on.

        In the default's weight layout, if with what the plan shares nothing is as fast as the default there.
        """
        grid = sorted([*verdict.grid, *raced], key=lambda each: each.size)
        settled = verdict.settled
        keys = [finalist.key for finalist in verdict.chosen] + [each.default.key for each in raced]
        if any(all(map(each.slower_than_default, each.with_constraints(settled.constraints))) for each in raced):
            settled = settle(grid, self._copies)
            keys = distil(grid, settled.constraints)
        tuned = [each for each in grid if each.size in {f.problem.size for f in verdict.finals}]
        return self._decided(grid, tuned, settled, keys, verdict.candidates)

    def _decided(
        self,
        grid: Sequence[Raced],
        tuned: Sequence[Raced],
        settled: Settled,
        keys: Sequence[str],
        candidates: int,
        *,
        steps: int = _STEPS,
    ) -> Verdict:
        chosen = assign(grid, keys, settled.constraints)
        crossings = tuple(self._crossings(grid, chosen, steps))
        by_size = {each.size: finalist for each, finalist in zip(grid, chosen, strict=True)}
        made = tuple(_final(each, by_size[each.size]) for each in tuned)
        return Verdict(settled, tuple(grid), tuple(chosen), crossings, made, candidates)

    def _crossings(self, grid: Sequence[Raced], chosen: Sequence[Finalist], steps: int) -> Iterator[Crossing]:
        """Where each kernel hands over to the next: narrowed by races of the two, a few for each."""
        changes = [i for i in range(len(grid) - 1) if chosen[i].key != chosen[i + 1].key]
        for done, index in enumerate(changes):
            below, above = chosen[index], chosen[index + 1]
            crossing = Crossing(below.key, above.key, grid[index].size, grid[index + 1].size)
            for step in range(steps):
                if (middle := crossing.middle) is None or (step and time.monotonic() > self._until):
                    break
                if time.monotonic() > self._stop_at:
                    break
                tuner = self._make_tuner(grid[0].problem.with_size(middle))
                both = [below.built.variant.config, above.built.variant.config]
                races = steps * (len(changes) - done) - step
                raced = self._race(tuner, both, self._until, races, _PROBE_S, note="  switch")
                if raced is None:
                    break
                crossing = crossing.narrowed(raced)
            yield crossing

    def _raced_between(self, tuned: Sequence[Raced], winners: Sequence[Config]) -> list[Raced]:
        """Race the winners of the tuned sizes at the sizes between and beyond them, which they serve, too."""
        sizes = [each.size for each in tuned]
        until = self._share(_BETWEEN_SHARE)
        found = []
        todo = [*sizes_between(sizes), 2 * sizes[-1]]
        for done, size in enumerate(todo):
            if time.monotonic() > self._stop_at:
                break
            try:
                problem = tuned[0].problem.with_size(size)
                raced = self._race(self._make_tuner(problem), winners, until, len(todo) - done, _PROBE_S)
            except TilewrightError as error:
                self._progress.say(f"{size} is not raced: {error}")
                continue
            if raced is not None:
                found.append(raced)
        return found

    def _race_at(self, verdict: Verdict, size: int) -> Raced | None:
        """All that serve anywhere, and the default, at one more size."""
        configs = [finalist.built.variant.config for finalist in verdict.chosen]
        tuner = self._make_tuner(verdict.grid[0].problem.with_size(size))
        raced = race_configs(tuner, configs, _PROBE_S, self._starts)
        self._progress.raced(f"{tuner.result.problem.title}  probe", raced)
        return self._with_noise(raced)

    def _race(
        self,
        tuner: ProblemTuner,
        configs: Sequence[Config],
        until: float,
        races_left: int,
        most_s: float,
        *,
        note: str = "",
    ) -> Raced | None:
        seconds = (until - time.monotonic()) / races_left
        raced = race_configs(tuner, configs, min(max(seconds, LEAST_RACE_S), most_s), self._starts)
        self._progress.raced(tuner.result.problem.title + note, raced)
        return self._with_noise(raced)

    def _with_noise(self, raced: Raced | None) -> Raced | None:
        return None if raced is None else replace(raced, noise=noise_near(self._tuned, raced.size))

    def _share(self, share: float) -> float:
        """The moment at which ``share`` of the time that is left is over."""
        now = time.monotonic()
        return now + max(0.0, self._until - now) * share


def _contenders(
    tuner: ProblemTuner,
    solved: Sequence[ProblemTuner],
    constraints: Sequence[PlanConstraint],
    likely: Sequence[PlanConstraint],
    finalists: int,
) -> list[Config]:
    """A size's own fastest with each constraint and of all, and the fastest of every other size with each likely one.

    Also with one in which this size has none: a plan within it needs a kernel for every size.
    """
    own = [c.config for constraint in constraints for c in tuner.result.finalists(finalists, constraint)]
    of_all = [c.config for c in tuner.result.finalists(1)]
    shared = [constraint for constraint in constraints if constraint in likely or not tuner.result.ranked(constraint)]
    others = [c.config for constraint in shared for other in solved for c in other.result.finalists(1, constraint)]
    return list(dict.fromkeys([*own, *of_all, *others]))


def _fastest_kernels(tuned: Sequence[Raced], constraints: Sequence[PlanConstraint]) -> int:
    """How many kernels are the fastest at some size."""
    return len({each.with_constraints(constraints)[0].key for each in tuned})


def _winners(tuned: Sequence[Raced], constraints: Sequence[PlanConstraint]) -> list[Config]:
    """Those that are as good as the best at several sizes, and the best of each."""
    found: dict[Config, int] = {}
    for each in tuned:
        ranked = each.with_constraints(constraints)
        for finalist in ranked:
            if as_fast(each, finalist, ranked[0], len(ranked)):
                config = finalist.built.variant.config
                found[config] = found.get(config, 0) + (len(tuned) if finalist is ranked[0] else 1)
    best = sorted(found, key=lambda config: -found[config])
    return best[: len(tuned) + 2]


def _final(raced: Raced, winner: Finalist) -> Final:
    default = raced.default
    return Final(
        raced.problem,
        winner.built,
        winner.evaluation,
        default.built,
        default.evaluation,
        paired_ratio(default.samples_us, winner.samples_us),
        raced.noise,
    )


def _probe(verdict: Verdict, raced: Raced) -> Probe | None:
    """How what the plan serves did; None where it was not right."""
    entry = next(each for each in verdict.entries if each.max_size is None or raced.size <= each.max_size)
    served = raced.of(entry.kernel_key) if entry.kernel_key else None
    if served is None:
        return None
    speedup = paired_ratio(raced.default.samples_us, served.samples_us)
    return Probe(raced.problem, served.key, speedup, raced.slower_than_default(served))
