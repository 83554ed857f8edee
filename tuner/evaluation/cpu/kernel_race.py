"""A race among checked kernels, run again without those that ruin it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.evaluation.cpu.kernel_runner import CRASHES_TO_BLAME, KernelRunner, Mode, failed
from tilewright.tuner.evaluation.cpu.session import KernelFaultError, Program
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.evaluation.problems import ProblemData
from tilewright.tuner.evaluation.racing import RaceRules, race
from tilewright.tuner.evaluation.rotation import Rotation
from tilewright.tuner.evaluation.statistics import median_interval
from tilewright.tuning_db.records import Outcome

_LOSSES_TO_GIVE_UP = 5
"""Workers that died while they ran nothing, after which all that is left of a batch counts as crashed."""

Programs = Mapping[tuple[int, int], Program]
"""By (contestant, input set)."""


class KernelRace:
    """Kernels that were right when checked, to be timed on one problem.

    Args:
        kernel_runner: where they run.
        kernels: the contestants, each with its own index; the same kernel may come twice.
        data: of the problem.
        mode: how they are called.
        order: shuffles the laps.

    """

    def __init__(
        self,
        kernel_runner: KernelRunner,
        kernels: Sequence[BuiltKernel],
        data: ProblemData,
        mode: Mode,
        order: random.Random,
    ) -> None:
        self._kernel_runner = kernel_runner
        self._kernels = kernels
        self._data = data
        self._mode = mode
        self._order = order
        self._crashes: Counter[int | None] = Counter()

    def run(self, checked: Sequence[Evaluation], *, budget_s: float, rules: RaceRules) -> list[Evaluation]:
        """Race, then check those that were timed to the end once more; ``checked`` completed by times or a failure.

        A race that a kernel spoils (by a second crash, a hang, an error code) begins again without it, with the same
        budget.
        """
        self._kernel_runner.reserve(self._kernels, self._data, self._mode.threads)
        results = list(checked)
        racers = list(range(len(results)))
        while racers:
            programs = {
                (racer, index): self._kernel_runner.program(self._kernels[racer], self._data, index, self._mode)
                for racer in racers
                for index in range(len(self._data.sets))
            }
            lap = partial(self._lap, rotation=Rotation(len(self._data.sets)), programs=programs)
            try:
                result = race(racers, lap, budget_s=budget_s, rules=rules, order=self._order)
            except KernelFaultError as fault:
                for racer in self._blamed(fault, racers, programs):
                    results[racer] = failed(self._kernels[racer].key, fault, "when timed")
                    racers.remove(racer)
                continue
            for racer, samples in result.samples_us.items():
                if racer in result.finalists:
                    results[racer] = self._check_again(racer, results[racer])
                if results[racer].outcome is Outcome.OK:
                    results[racer] = _timed(results[racer], samples)
            break
        return results

    def _lap(self, order: Sequence[int], rotation: Rotation, programs: Programs) -> dict[int, NDArray[np.float64]]:
        """Times of one lap in microseconds [sets], for every contestant in ``order``."""
        calls = rotation.lap(order)
        # Where calls are short, what the first one waits for (sleeping threads) would be much of its time.
        warm_up = programs[calls[-1]] if rotation.sets > 1 else None
        times_ns = self._kernel_runner.session.run([programs[call] for call in calls], warm_up=warm_up)
        times_us = {racer: np.empty(rotation.sets) for racer in order}
        for (racer, index), time_ns in zip(calls, times_ns, strict=True):
            times_us[racer][index] = time_ns / 1e3
        return times_us

    def _blamed(self, fault: KernelFaultError, racers: Sequence[int], programs: Programs) -> list[int]:
        """Contestants that are out because of ``fault``: none yet for a crash that may be somebody else's fault."""
        blamed = next((racer for (racer, _), program in programs.items() if program is fault.program), None)
        if fault.outcome is Outcome.CRASHED:
            self._crashes[blamed] += 1
            if self._crashes[blamed] < (_LOSSES_TO_GIVE_UP if blamed is None else CRASHES_TO_BLAME):
                return []
        return list(racers) if blamed is None else [blamed]

    def _check_again(self, racer: int, checked: Evaluation) -> Evaluation:
        """Whether a kernel is still right after its many calls."""
        try:
            error = self._kernel_runner.checked_run(self._kernels[racer], self._data, self._mode)
        except KernelFaultError as fault:
            return failed(self._kernels[racer].key, fault, "after it was timed; it was right before")
        return replace(checked, error=max(error, checked.error or 0.0))


def _timed(checked: Evaluation, samples_us: NDArray[np.float64]) -> Evaluation:
    interval = median_interval(samples_us)
    return replace(
        checked,
        samples_us=tuple(samples_us.tolist()),
        median_us=interval.median,
        low_us=interval.low,
        high_us=interval.high,
    )
