"""Where kernels race on this machine's CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.evaluation.cpu.kernel_runner import KernelRunner, Mode
from tilewright.tuner.evaluation.cpu.session import Program
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.problems import ProblemData
from tilewright.tuner.evaluation.racing import Lap
from tilewright.tuner.evaluation.rotation import Rotation

Programs = Mapping[tuple[int, int], Program]
"""By (contestant, input set)."""


class KernelTrack:
    """A :class:`~tilewright.tuner.evaluation.contest.Track` of one problem.

    Args:
        kernel_runner: where the kernels run, for which was reserved.
        kernels: the contestants.
        data: of the problem.
        mode: how they are called.

    """

    def __init__(
        self, kernel_runner: KernelRunner, kernels: Sequence[BuiltKernel], data: ProblemData, mode: Mode
    ) -> None:
        self._kernel_runner = kernel_runner
        self._kernels = kernels
        self._data = data
        self._mode = mode
        self._programs: Programs = {}

    def start(self, racers: Sequence[int]) -> Lap:
        """Each calls on every input set once in a lap."""
        self._programs = {
            (racer, index): self._kernel_runner.program(self._kernels[racer], self._data, index, self._mode)
            for racer in racers
            for index in range(len(self._data.sets))
        }
        return partial(self._lap, rotation=Rotation(len(self._data.sets)))

    def blamed(self, fault: KernelFaultError) -> int | None:
        """Whose program it was."""
        return next((racer for (racer, _), program in self._programs.items() if program is fault.program), None)

    def check_again(self, racer: int) -> float:
        """On the first input set."""
        return self._kernel_runner.checked_run(self._kernels[racer], self._data, self._mode)

    def _lap(self, order: Sequence[int], rotation: Rotation) -> dict[int, NDArray[np.float64]]:
        """Times of one lap in microseconds [sets], for every contestant in ``order``."""
        calls = rotation.lap(order)
        # Where calls are short, what the first one waits for (sleeping threads) would be much of its time.
        warm_up = self._programs[calls[-1]] if rotation.sets > 1 else None
        times_ns = self._kernel_runner.session.run([self._programs[call] for call in calls], warm_up=warm_up)
        times_us = {racer: np.empty(rotation.sets) for racer in order}
        for (racer, index), time_ns in zip(calls, times_ns, strict=True):
            times_us[racer][index] = time_ns / 1e3
        return times_us
