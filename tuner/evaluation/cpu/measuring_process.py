"""The process that measures, as its parent sees it: what it runs now is known even when it dies of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.process import WorkerLostError, WorkerProcess
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.worker import PROGRESS_BYTES

_START_LIMIT_S = 60.0


class MeasuringProcess:
    """A running worker (:mod:`tilewright.tuner.evaluation.cpu.worker`).

    Args:
        openmp: path of the library that has ``GOMP_parallel``.
        memory_limit_bytes: how much memory a kernel may get for itself.

    Raises:
        WorkerLostError: when it does not start.

    """

    def __init__(self, openmp: str, memory_limit_bytes: int) -> None:
        progress_fd = os.memfd_create("tilewright-progress", os.MFD_CLOEXEC)
        os.truncate(progress_fd, PROGRESS_BYTES)
        self._progress = memoryview(mmap.mmap(progress_fd, PROGRESS_BYTES)).cast("q")
        try:
            self._worker = WorkerProcess(
                "tilewright.tuner.evaluation.cpu.worker",
                [progress_fd, openmp, memory_limit_bytes],
                start_limit_s=_START_LIMIT_S,
                handles=[progress_fd],
            )
        finally:
            os.close(progress_fd)
        try:
            self._worker.wait_until_ready()
        except WorkerLostError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the worker, and of its process group."""
        return self._worker.pid

    @property
    def program(self) -> int:
        """Number of what the last request began last; 0 when it ran nothing."""
        return self._progress[1]

    def request(self, message: Message, *, limit_s: float, descriptors: Sequence[int] = ()) -> Message:
        """Send ``message`` and wait for the answer.

        ``limit_s`` is for each program that the worker begins, not for all of them together.

        Raises:
            WorkerHungError: when that passed.
            WorkerLostError: when the worker died, or answers nonsense.

        """
        self._progress[1] = 0
        return self._worker.ask(message, limit_s=limit_s, descriptors=descriptors, progress=lambda: self._progress[0])

    def close(self) -> None:
        """Kill the worker and free what belongs to it."""
        self._worker.close()


def openmp_library() -> str:
    """Path of the library whose thread pool the runtime uses, so that measuring is as deployed.

    Raises:
        TilewrightError: when there is none.

    """
    from tilewright.runtime.launchers.openmp import fork_address

    class Symbol(ctypes.Structure):
        _fields_ = [
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        ]

    symbol = Symbol()
    address = fork_address()
    if not address or not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol)):
        raise TilewrightError("found no OpenMP library to run threads with; install torch with OpenMP, or libgomp")
    return os.fsdecode(symbol.file)
