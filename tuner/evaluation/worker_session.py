"""A worker process that kernels may ruin: one that died is replaced at the next request, and somebody is blamed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.process import WorkerHungError, WorkerLostError
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.measuring_process import MeasuringProcess
from tilewright.tuning_db.records import Outcome

TRUSTED_LIMIT_S = 120.0
"""For requests that run nothing of a kernel's."""
_STARTS = 5
"""Attempts to start a worker."""


class WorkerSession(ABC):
    """The worker, which knows things under numbers that this side chose, and is told all of it anew when it died."""

    def __init__(self) -> None:
        self._worker: MeasuringProcess | None = None

    @property
    def worker_pid(self) -> int | None:
        """Of the worker; None when there is none at the moment."""
        return self._worker.pid if self._worker else None

    def close(self) -> None:
        """End the worker."""
        self._drop_worker()

    @abstractmethod
    def _new_worker(self) -> MeasuringProcess:
        """Start one.

        Raises:
            WorkerLostError: when it does not start.

        """

    @abstractmethod
    def _program(self, number: int) -> object | None:
        """What the worker knows under ``number``; None for nothing."""

    @abstractmethod
    def _forget(self) -> None:
        """Take note that the worker is gone, and with it all that it knew."""

    def _start_worker(self) -> MeasuringProcess:
        """Start a worker, again when it is killed from outside (for its memory, say) before it is ready.

        Raises:
            TilewrightError: when none can be started.

        """
        for attempt in range(_STARTS):
            try:
                return self._new_worker()
            except WorkerLostError as error:
                if isinstance(error, WorkerHungError) or attempt == _STARTS - 1:
                    raise TilewrightError(f"the measuring process did not start: {error}") from error
        raise AssertionError

    def _request(self, message: Message, limit_s: float, descriptors: Sequence[int] = ()) -> Message:
        """Ask the worker; its loss is the fault of what it began last.

        Raises:
            KernelFaultError: when it died, or took longer than ``limit_s`` for one program.
            TilewrightError: when none can be started.

        """
        if self._worker is None:
            self._worker = self._start_worker()
        try:
            return self._worker.request(message, limit_s=limit_s, descriptors=descriptors)
        except WorkerLostError as error:
            outcome = Outcome.TIMED_OUT if isinstance(error, WorkerHungError) else Outcome.CRASHED
            program = self._program(self._worker.program)
            self._drop_worker()
            raise KernelFaultError(outcome, str(error), program) from error

    def _drop_worker(self) -> None:
        """End the worker and forget what it knew."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._forget()
