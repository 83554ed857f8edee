"""The last races of a signature: finalists at the tuned sizes, winners between, the plan at random sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tilewright.codegen.ops.base import Problem
from tilewright.codegen.space import Config
from tilewright.tuner.evaluation.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.statistics import Ratio, paired_ratio
from tilewright.tuner.loop import ProblemTuner
from tilewright.tuner.plan import (
    Final,
    Layout,
    Raced,
    decide,
    priced,
    race_configs,
    race_finalists,
    settle_layout,
    sizes_between,
    slower_than_default,
)
from tilewright.tuner.progress import Progress
from tilewright.tuning_db.records import PlanRecord

_TUNED_SHARE = 0.6
"""Of the time for the finals, for races at the tuned sizes; the rest is for the noise and the sizes between."""
_NOISE_S = 0.5
"""Seconds for the race of a winner against itself."""
_BETWEEN_S = 3.0
"""Most seconds for a race between tuned sizes, and for a probe."""
_MOST_S = 6.0
_LEAST_S = 1.0


@dataclass(frozen=True)
class Verdict:
    """Who serves what: the layout of all, the winners at the tuned sizes, and those at the sizes between."""

    layout: Layout
    finals: tuple[Final, ...]
    between: tuple[Final, ...]


@dataclass(frozen=True)
class Probe:
    """What the finished plan does at a size that had no part in making it."""

    problem: Problem
    kernel_key: str
    speedup: Ratio
    """Default's time over the kernel's."""
    slower: bool
    """Whether the kernel is slower than the default beyond the noise."""

    @property
    def interval(self) -> tuple[float, float, float]:
        """Median, low and high of the speedup."""
        return self.speedup.median, self.speedup.low, self.speedup.high


class Finals:
    """Runs the last races of one signature.

    Args:
        make_tuner: for a problem; its tuner builds and stores what is raced.
        evaluator: of the signature.
        progress: told of every race.
        until: the moment (monotonic clock) by which all but the probes should be over.

    """

    def __init__(
        self,
        make_tuner: Callable[[Problem], ProblemTuner],
        evaluator: CpuEvaluator,
        progress: Progress,
        *,
        until: float,
    ) -> None:
        self._make_tuner = make_tuner
        self._evaluator = evaluator
        self._progress = progress
        self._until = until
        self._raced: list[Raced] = []

    def run(self, tuners: Sequence[ProblemTuner], layout_keys: Sequence[str]) -> Verdict | None:
        """Race the best of every layout in question, settle the layout, decide; None when nothing was right."""
        solved = [tuner for tuner in tuners if tuner.result.candidates]
        raced = []
        for done, tuner in enumerate(solved):
            seconds = _TUNED_SHARE * (self._until - time.monotonic()) / (len(solved) - done)
            raced.append(race_finalists(tuner, layout_keys, min(max(seconds, _LEAST_S), _MOST_S)))
            self._progress.raced(tuner.result.problem.title, raced[-1])
        self._raced = right = [each for each in raced if each]
        if not right:
            return None
        layout = settle_layout(right)
        finals = tuple(self._decided(right, layout))
        return Verdict(layout, finals, tuple(self._decided(self._raced_between(finals), layout)))

    def within(self, layout_key: str) -> Verdict | None:
        """What the races of :meth:`run` say of another layout; None where it has no right kernel for some size."""
        if not all(each.fastest(layout_key) for each in self._raced):
            return None
        layout = priced(layout_key, self._raced)
        return Verdict(layout, tuple(self._decided(self._raced, layout)), ())

    def probe(self, verdict: Verdict, plan: PlanRecord, sizes: Sequence[int]) -> list[Probe]:
        """Race what ``plan`` serves at ``sizes`` against the default."""
        configs = {final.winner.variant.key: final.winner.variant.config for final in _all(verdict)}
        probes = []
        for size in sizes:
            entry = plan.entry_for(size)
            if entry is None or entry.kernel_key is None:
                continue
            problem = verdict.finals[0].problem.with_size(size)
            raced = race_configs(self._make_tuner(problem), [configs[entry.kernel_key]], _BETWEEN_S)
            self._progress.raced(f"{problem.title}  probe", raced)
            served = raced and next((each for each in raced.right if each.built.variant.key == entry.kernel_key), None)
            if raced and served:
                speedup = paired_ratio(raced.default.samples_us, served.samples_us)
                slower = slower_than_default(raced, entry.kernel_key)
                probes.append(Probe(problem, entry.kernel_key, speedup, slower))
        return probes

    def _decided(self, raced: Sequence[Raced], layout: Layout) -> Iterator[Final]:
        for each in raced:
            final = decide(each, layout, self._evaluator, _NOISE_S)
            if final is not None:
                yield final

    def _raced_between(self, finals: Sequence[Final]) -> list[Raced]:
        """Race the winners of the tuned sizes at the sizes between them, which they serve, too."""
        winners: list[Config] = list(dict.fromkeys(final.winner.variant.config for final in finals))
        sizes = sizes_between(sorted(final.problem.dynamic_size for final in finals)) if len(winners) > 1 else []
        between = []
        for done, size in enumerate(sizes):
            seconds = (self._until - time.monotonic()) / (len(sizes) - done) - _NOISE_S
            problem = finals[0].problem.with_size(size)
            raced = race_configs(self._make_tuner(problem), winners, min(max(seconds, _LEAST_S), _BETWEEN_S))
            self._progress.raced(problem.title, raced)
            if raced:
                between.append(raced)
        return between


def _all(verdict: Verdict) -> tuple[Final, ...]:
    return (*verdict.finals, *verdict.between)
