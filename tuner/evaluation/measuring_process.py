"""The process that measures, as its parent sees it: what it runs now is known even when it dies of it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.process import WorkerLostError, WorkerProcess
from tilewright.tuner.evaluation.begun import Begun

_START_LIMIT_S = 60.0


class MeasuringProcess:
    """A running worker.

    Args:
        module: of the worker; it gets a descriptor of :class:`Begun`, then ``arguments``.
        arguments: of the job.
        handles: further file descriptors that it has open under the same numbers.

    Raises:
        WorkerLostError: when it does not start.

    """

    def __init__(self, module: str, arguments: Sequence[object], handles: Sequence[int] = ()) -> None:
        self._begun = Begun()
        try:
            self._worker = WorkerProcess(
                module,
                [self._begun.fd, *arguments],
                start_limit_s=_START_LIMIT_S,
                handles=[self._begun.fd, *handles],
            )
        finally:
            os.close(self._begun.fd)
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
        return self._begun.program

    def request(self, message: Message, *, limit_s: float, descriptors: Sequence[int] = ()) -> Message:
        """Send ``message`` and wait for the answer.

        ``limit_s`` is for each program that the worker begins, not for all of them together.

        Raises:
            WorkerHungError: when that passed.
            WorkerLostError: when the worker died, or answers nonsense.

        """
        self._begun.forget()
        return self._worker.ask(message, limit_s=limit_s, descriptors=descriptors, progress=lambda: self._begun.calls)

    def close(self) -> None:
        """Kill the worker and free what belongs to it."""
        self._worker.close()
