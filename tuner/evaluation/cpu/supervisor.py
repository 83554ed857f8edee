"""The parent's side of one worker process: start it, ask it, limit it, bury it."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Sequence

from tilewright.codegen.workers.process import start_python
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.protocol import Message, receive, send
from tilewright.tuner.evaluation.cpu.worker import PROGRESS_BYTES

_START_LIMIT_S = 60.0
_POLL_S = 0.1
_MESSAGE_LIMIT_S = 10.0
"""For a message that has begun to arrive."""
_EXIT_LIMIT_S = 1.0
"""For a worker whose connection is closed to end."""
_LOG_TAIL_BYTES = 300


class WorkerLostError(Exception):
    """The worker died; ``program`` is the number of what it ran, 0 when it ran nothing."""

    def __init__(self, reason: str, program: int) -> None:
        super().__init__(reason)
        self.program = program


class WorkerHungError(WorkerLostError):
    """The worker did not answer in time and was killed."""


class WorkerProcess:
    """A running worker, in a session and process group of its own.

    Args:
        openmp: path of the library that has ``GOMP_parallel``.
        memory_limit_bytes: how much memory a kernel may get for itself.

    Raises:
        WorkerLostError: when it does not start.

    """

    def __init__(self, openmp: str, memory_limit_bytes: int) -> None:
        self._log_fd = os.memfd_create("tilewright-log", os.MFD_CLOEXEC)
        progress_fd = os.memfd_create("tilewright-progress", os.MFD_CLOEXEC)
        os.truncate(progress_fd, PROGRESS_BYTES)
        self._progress = memoryview(mmap.mmap(progress_fd, PROGRESS_BYTES)).cast("q")
        self._channel, theirs = socket.socketpair()
        arguments = [os.getpid(), theirs.fileno(), progress_fd, openmp, memory_limit_bytes]
        with theirs:
            self._process = start_python(
                "tilewright.tuner.evaluation.cpu.worker",
                arguments,
                log=self._log_fd,
                handles=[theirs.fileno(), progress_fd],
                environment=os.environ,
            )
        os.close(progress_fd)
        try:
            self._receive(_START_LIMIT_S)
        except WorkerLostError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the worker, and of its process group."""
        return self._process.pid

    def request(self, message: Message, *, limit_s: float, descriptors: Sequence[int] = ()) -> Message:
        """Send ``message`` and wait for the answer.

        ``limit_s`` is for each program that the worker begins, not for all of them together.

        Raises:
            WorkerHungError: when that passed.
            WorkerLostError: when the worker died, or answers nonsense.

        """
        self._progress[1] = 0
        try:
            send(self._channel, message, descriptors)
        except OSError as error:
            raise self._lost() from error
        return self._receive(limit_s)

    def _receive(self, limit_s: float) -> Message:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        begun, deadline = self._progress[0], time.monotonic() + limit_s
        while not poll.poll(1000 * min(_POLL_S, limit_s)):
            if self._progress[0] != begun:
                begun, deadline = self._progress[0], time.monotonic() + limit_s
            elif time.monotonic() > deadline:
                program = self._progress[1]
                self.kill()
                raise WorkerHungError(f"no result after {limit_s:g} s", program)
        self._channel.settimeout(_MESSAGE_LIMIT_S)
        try:
            message, descriptors = receive(self._channel)
        except (OSError, EOFError, ValueError) as error:
            raise self._lost() from error
        for descriptor in descriptors:
            os.close(descriptor)
        return message

    def _lost(self) -> WorkerLostError:
        """Describe how the worker ended. A kernel may have closed the connection and run on, so it is killed, too."""
        program = self._progress[1]
        running = not self._exits_within(_EXIT_LIMIT_S)
        self.kill()
        status = self._process.returncode
        if running:
            reason = "broke its connection to the tuner"
        elif status < 0:
            reason = f"killed by {_signal_name(-status)}"
        else:
            reason = f"ended the process with status {status}"
        tail = self._log_tail()
        return WorkerLostError(f"{reason}: {tail}" if tail else reason, program)

    def _exits_within(self, limit_s: float) -> bool:
        """Wait for the worker's end, leaving it a zombie so that nobody else gets its process group's number."""
        deadline = time.monotonic() + limit_s
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _log_tail(self) -> str:
        """Last line that the worker or a kernel printed."""
        size = os.fstat(self._log_fd).st_size
        text = os.pread(self._log_fd, _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES)).decode(errors="replace")
        lines = text.strip().splitlines()
        return lines[-1].strip() if lines else ""

    def kill(self) -> None:
        """End the worker and all that a kernel may have started in its process group."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Kill the worker and free what belongs to it."""
        self.kill()
        self._channel.close()
        os.close(self._log_fd)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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
