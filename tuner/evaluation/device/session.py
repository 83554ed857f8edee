"""What the worker has to know before it can run something, sent to it when needed, and again after a restart."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.recipe.resolve import ResolvedLaunch
from tilewright.codegen.workers.channel import Message
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.cuda.memory import OUT_OF_MEMORY
from tilewright.structuring import unstructure
from tilewright.tuner.evaluation.device.calls import GUARD, GUARD_BYTES
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.measuring_process import MeasuringProcess
from tilewright.tuner.evaluation.worker_session import TRUSTED_LIMIT_S, WorkerSession
from tilewright.tuning_db.records import Outcome

_STAGING_BYTES = 64 << 20
"""Of the file through which bytes travel, part by part."""
_OPENINGS = 3
"""Attempts to open the device."""
_REFUSALS: Final = frozenset({1, OUT_OF_MEMORY, 200, 209, 218, 400, 500, 701, 720, 801, 912})
"""``CUresult`` of launches that the driver refused, after which its context still works."""
_LAUNCH_TIMEOUT: Final = 702
_REFUSED_BY_US: Final = 0

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """Memory of the device."""

    nbytes: int
    content: Bytes | None = None
    """What it begins with; None: kernels write it."""


@dataclass(frozen=True, eq=False)
class DeviceProgram:
    """One call of a kernel with everything bound; see :class:`tilewright.codegen.recipe.model.Recipe`."""

    binaries: tuple[Path, ...]
    """Of its launches."""
    recipe: Recipe
    launches: tuple[ResolvedLaunch, ...]
    """What the recipe comes to, but for addresses."""
    buffers: Mapping[str, DeviceBuffer]
    """By the names that arguments say."""
    workspace: DeviceBuffer
    """The one that its kernel asked for."""
    poison: tuple[DeviceBuffer, ...]
    """Filled with NaN before a call that is checked."""
    zero: tuple[DeviceBuffer, ...]
    """Zeroed as part of the call."""


class DeviceMemoryError(TilewrightError):
    """The device's memory is too short."""


class DeviceSession(WorkerSession):
    """Runs programs in a worker process; one that died is replaced at the next request.

    Args:
        device_index: among the devices that the driver shows.
        scratch_bytes: that are filled before what is timed.
        time_limit_s: for one call of a kernel, or one block of calls that is timed.

    Raises:
        TilewrightError: when no worker can be started, or the device cannot be opened.

    """

    def __init__(self, *, device_index: int, scratch_bytes: int, time_limit_s: float) -> None:
        super().__init__()
        self._device_index = device_index
        self._scratch_bytes = scratch_bytes
        self._time_limit_s = time_limit_s
        self._numbers = itertools.count(1)
        self._buffers: dict[DeviceBuffer, int] = {}
        self._programs: dict[DeviceProgram, int] = {}
        self.method = ""
        """How the last blocks were timed; see the worker."""
        self._staging_fd = os.memfd_create("tilewright-staging", os.MFD_CLOEXEC)
        os.truncate(self._staging_fd, _STAGING_BYTES)
        self._staging: Bytes = np.frombuffer(mmap.mmap(self._staging_fd, _STAGING_BYTES), np.uint8)
        try:
            answer = self._open()
        except BaseException:
            self.close()
            raise
        self.driver_version: str = answer["driver"]
        self.free_bytes: int = answer["free_bytes"]
        """Of the device's memory, when it was opened."""

    def close(self) -> None:
        """End the worker, and with it all that it holds of the device."""
        super().close()
        with contextlib.suppress(OSError):  # closed before
            os.close(self._staging_fd)

    def run(self, program: DeviceProgram) -> None:
        """Call ``program`` once, its outputs poisoned before.

        Raises:
            KernelFaultError: when a kernel cannot be loaded, failed, took too long or ruined the worker.
            TilewrightError: when no worker can be started, or memory is short.

        """
        self._ran({"do": "run", "program": self._prepare(program)})

    def time(self, blocks: Sequence[Sequence[DeviceProgram]], repeats: int) -> list[float]:
        """Microseconds of a call, for every block of calls: each is done ``repeats`` times over, and timed as a whole.

        Raises:
            KernelFaultError: as :meth:`run` does.
            TilewrightError: as :meth:`run` does.

        """
        numbers = [[self._prepare(program) for program in block] for block in blocks]
        answer = self._ran({"do": "time", "blocks": numbers, "repeats": repeats})
        self.method = str(answer["method"])
        return [float(time_us) for time_us in answer["times_us"]]

    def read(self, buffer: DeviceBuffer) -> Bytes:
        """What a buffer that a program used holds, its guards not included."""
        return self._read(buffer, GUARD_BYTES, buffer.nbytes)

    def damage(self, buffer: DeviceBuffer) -> str | None:
        """What was written around a buffer that a program used; None when nothing was."""
        before = self._read(buffer, 0, GUARD_BYTES)
        after = self._read(buffer, GUARD_BYTES + buffer.nbytes, GUARD_BYTES)
        counts = [int(np.count_nonzero(part != GUARD)) for part in (before, after)]
        return f"{counts[0]} bytes before and {counts[1]} bytes after it" if any(counts) else None

    def renew(self) -> None:
        """Have a new worker for the next request, and what it needs sent to it anew."""
        self._drop_worker()

    def forget_programs(self) -> None:
        """Free what was prepared for past calls."""
        self._programs.clear()
        if self._worker is not None:
            with contextlib.suppress(KernelFaultError):  # one that dies now has nothing left to free
                self._trusted({"do": "forget"})

    def release(self, buffers: Iterable[DeviceBuffer]) -> None:
        """Free ``buffers``; no program that uses them may be run again."""
        for buffer in buffers:
            number = self._buffers.pop(buffer, None)
            if number is not None:
                with contextlib.suppress(KernelFaultError):
                    self._trusted({"do": "free", "buffer": number})

    def _new_worker(self) -> MeasuringProcess:
        return MeasuringProcess(
            "tilewright.tuner.evaluation.device.worker",
            [self._staging_fd, _STAGING_BYTES, self._device_index],
            handles=[self._staging_fd],
        )

    def _program(self, number: int) -> DeviceProgram | None:
        return next((program for program, known in self._programs.items() if known == number), None)

    def _forget(self) -> None:
        self._buffers.clear()
        self._programs.clear()

    def _open(self) -> Message:
        """Start a worker, and have it open the device; again when it is killed from outside meanwhile.

        Raises:
            TilewrightError: when the device cannot be opened.

        """
        for attempt in range(_OPENINGS):
            self._worker = self._start_worker()
            try:
                answer = self._trusted({"do": "open"})
                if self._scratch_bytes:
                    self._trusted({"do": "scratch", "bytes": self._scratch_bytes})
            except KernelFaultError as fault:
                if attempt == _OPENINGS - 1:
                    raise TilewrightError(f"the device cannot be opened for measuring: {fault}") from fault
            else:
                return answer
        raise AssertionError

    def _prepare(self, program: DeviceProgram) -> int:
        """Number of ``program`` in the worker, which has been told all about it."""
        if self._worker is None:
            self._open()
        if program in self._programs:
            return self._programs[program]
        for buffer in program.buffers.values():
            if buffer is not program.workspace:
                self._provide(buffer)
        try:
            self._provide(program.workspace)
        except DeviceMemoryError as error:
            self._drop_worker()
            needs = f"needs a workspace of {program.workspace.nbytes} bytes, which the device does not have"
            raise KernelFaultError(Outcome.REJECTED, needs, program) from error
        number = next(self._numbers)
        definition: Message = {
            "do": "define",
            "program": number,
            "binaries": [str(path) for path in program.binaries],
            "recipe": [unstructure(launch) for launch in program.recipe.launches],
            "launches": [unstructure(launch) for launch in program.launches],
            "buffers": {name: self._buffers[buffer] for name, buffer in program.buffers.items()},
            "poison": [self._buffers[buffer] for buffer in program.poison],
            "zero": [self._buffers[buffer] for buffer in program.zero],
        }
        self._programs[program] = number
        try:
            answer = self._request(definition, self._time_limit_s)
        except KernelFaultError as fault:
            raise KernelFaultError(fault.outcome, f"{fault} while it was loaded", program) from fault
        if "error" in answer:
            del self._programs[program]
            self._raise_fault(answer, program)
        return number

    def _provide(self, buffer: DeviceBuffer) -> None:
        if buffer in self._buffers:
            return
        number = next(self._numbers)
        self._trusted({"do": "allocate", "buffer": number, "bytes": buffer.nbytes})
        self._buffers[buffer] = number
        if buffer.content is not None:
            for begin, part in self._parts(buffer.nbytes):
                self._staging[:part] = buffer.content[begin : begin + part]
                self._trusted({"do": "write", "buffer": number, "offset": begin, "bytes": part})

    def _read(self, buffer: DeviceBuffer, begin: int, nbytes: int) -> Bytes:
        out = np.empty(nbytes, np.uint8)
        number = self._buffers[buffer]
        for offset, part in self._parts(nbytes):
            self._trusted({"do": "read", "buffer": number, "offset": begin + offset, "bytes": part})
            out[offset : offset + part] = self._staging[:part]
        return out

    @staticmethod
    def _parts(nbytes: int) -> Iterator[tuple[int, int]]:
        """Begin and length of what fits the staging, one after the other."""
        for begin in range(0, nbytes, _STAGING_BYTES):
            yield begin, min(_STAGING_BYTES, nbytes - begin)

    def _ran(self, message: Message) -> Message:
        answer = self._request(message, self._time_limit_s)
        if "failed" in answer:
            self._raise_fault(answer, self._program(answer["failed"]))
        if "error" in answer:
            raise TilewrightError(f"the measuring process cannot {message['do']} kernels ({answer['error']})")
        return answer

    def _raise_fault(self, answer: Mapping[str, Any], program: DeviceProgram | None) -> None:
        """Blame ``program`` for what the driver answered; an error that ruined the context ends the worker."""
        code, reason = answer["code"], str(answer["error"])
        if code == _REFUSED_BY_US or code in _REFUSALS:
            if code == OUT_OF_MEMORY:
                self._drop_worker()
            raise KernelFaultError(Outcome.REJECTED, reason, program)
        self._drop_worker()
        raise KernelFaultError(Outcome.TIMED_OUT if code == _LAUNCH_TIMEOUT else Outcome.CRASHED, reason, program)

    def _trusted(self, message: Message) -> Message:
        """Ask for something that runs nothing of a kernel's."""
        answer = self._request(message, TRUSTED_LIMIT_S)
        if "error" not in answer:
            return answer
        if message["do"] == "open":
            raise TilewrightError(f"the device cannot be opened for measuring: {answer['error']}")
        if answer["code"] == OUT_OF_MEMORY:
            raise DeviceMemoryError(
                f"the device's memory is too short for {message.get('bytes', 0)} bytes more; tune a smaller problem, "
                "raise --tp or --ep, or end what else uses it"
            )
        raise TilewrightError(f"the measuring process cannot {message['do']} memory of the device ({answer['error']})")
