"""Where kernels race on a device: block after block of calls, each timed by the device itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.evaluation.device.conditions import Monitor
from tilewright.tuner.evaluation.device.kernel_runner import DeviceRunner
from tilewright.tuner.evaluation.device.problems import DeviceProblem
from tilewright.tuner.evaluation.device.session import DeviceProgram
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.evaluation.racing import Lap
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES
from tilewright.tuning_db.records import Outcome

BLOCK_US = 200.0
"""Least time of a block of the fastest kernel: what beginning to replay costs is then well below a percent of it."""
MOST_CALLS = 256
"""Of a block."""


class DeviceTrack:
    """A :class:`~tilewright.tuner.evaluation.contest.Track` of one problem.

    A block is one kernel's calls on all input sets in turn, so that data come back only after those of all others; a
    sample is the mean time of a call in a block. A lap has so many blocks of each that who drops out after it has an
    interval.

    Args:
        runner: where the kernels run, for which was reserved.
        kernels: the contestants.
        data: of the problem.
        monitor: looks at the device meanwhile.

    """

    def __init__(
        self, runner: DeviceRunner, kernels: Sequence[BuiltKernel], data: DeviceProblem, monitor: Monitor
    ) -> None:
        self._runner = runner
        self._kernels = kernels
        self._data = data
        self._monitor = monitor
        self._blocks: dict[int, list[DeviceProgram]] = {}
        self._repeats = 1

    def start(self, racers: Sequence[int]) -> Lap:
        """Have a block of every racer; how long it is, a first lap says, which counts for nothing else."""
        self._runner.session.forget_programs()
        self._blocks = {
            racer: [self._runner.program(self._kernels[racer], self._data, index) for index in self._set_indices]
            for racer in racers
        }
        self._repeats = 1
        calls = len(self._data.sets)
        fastest_us = min(self._timed(racers))
        wanted = math.ceil(BLOCK_US / (calls * max(fastest_us, 1e-3)))
        self._repeats = max(1, min(wanted, MOST_CALLS // calls))
        return self._lap

    def blamed(self, fault: KernelFaultError) -> int | None:
        """Whose program it was."""
        blocks = self._blocks.items()
        return next((racer for racer, block in blocks if any(each is fault.program for each in block)), None)

    def check_again(self, racer: int) -> float:
        """On the first input set.

        Where it is wrong now, the data are made anew, and it is wrong only if it still is: others ran on them.
        """
        kernel = self._kernels[racer]
        try:
            return self._runner.checked_run(kernel, self._data)
        except KernelFaultError as fault:
            if fault.outcome is not Outcome.WRONG:
                raise
            self._runner.session.renew()
            return self._runner.checked_run(kernel, self._data)

    @property
    def _set_indices(self) -> range:
        return range(len(self._data.sets))

    def _lap(self, order: Sequence[int]) -> dict[int, NDArray[np.float64]]:
        """Blocks of every contestant in ``order``, in turn: microseconds of a call [blocks]."""
        times_us = np.array(self._timed([*order] * MIN_SAMPLES)).reshape(MIN_SAMPLES, len(order))
        self._monitor.look()
        return {racer: times_us[:, place] for place, racer in enumerate(order)}

    def _timed(self, order: Sequence[int]) -> list[float]:
        """Microseconds of a call in a block of every contestant in ``order``."""
        return self._runner.session.time([self._blocks[racer] for racer in order], self._repeats)
