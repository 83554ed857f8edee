"""The parent's side of one child: start it, ask it, limit it, say how it ended, bury it.

Children do what may crash or hang: compilers, the interpreter, kernels. A new kind of work is a module whose ``main``
calls :func:`~tilewright.codegen.workers.child.connect` and :func:`~tilewright.codegen.workers.child.serve`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

from tilewright.codegen.workers.channel import Channel, Message

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of a process whose libraries start no threads: with several, it cannot be forked safely."""

_POLL_S = 0.1
_MESSAGE_LIMIT_S = 10.0
"""For a message that has begun to arrive, or waits to be taken."""
_EXIT_LIMIT_S = 1.0
"""For a child whose connection is closed to end."""
_LOG_TAIL_BYTES = 300


class WorkerLostError(Exception):
    """The child is gone; the message says in a few words how it ended: "killed by SIGSEGV: what it printed last"."""


class WorkerHungError(WorkerLostError):
    """The child did not answer in time and was killed."""


class WorkerProcess:
    """A Python process of ours with a connection to it, in a session and process group of its own.

    It imports what this process would, reads nothing, and what it prints is kept for :meth:`log_tail`. It is started
    without waiting for it; the first request does. A worker that is forgotten, or left when Python exits, is ended.

    Args:
        module: to run with ``python -m``; it gets this process's number, a descriptor and ``arguments``.
        arguments: of the job.
        start_limit_s: seconds until it must be ready.
        environment: of the child.
        handles: further file descriptors that it has open under the same numbers.
        grace_s: seconds to end by itself once its connection is closed, for one that has to tidy up.

    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[object] = (),
        *,
        start_limit_s: float,
        environment: Mapping[str, str] | None = None,
        handles: Sequence[int] = (),
        grace_s: float = 0.0,
    ) -> None:
        self._start_limit_s = start_limit_s
        self._is_ready = False
        self._log_fd = os.memfd_create("tilewright-log", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        """For a job that is asked several things at once; others use :meth:`ask`."""
        with theirs:
            words = [os.getpid(), theirs.fileno(), *arguments]
            self._process = subprocess.Popen(
                # -P: the current directory may hold anything.
                [sys.executable, "-P", "-m", module, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=self._log_fd,
                stderr=self._log_fd,
                pass_fds=(theirs.fileno(), *handles),
                start_new_session=True,
                env={**(environment or os.environ), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._end = weakref.finalize(self, _end, self._process, self.channel, self._log_fd, grace_s, os.getpid())

    @property
    def pid(self) -> int:
        """Of the child, and of its process group."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._end.alive and not _exits_within(self._process, 0.0)

    def wait_until_ready(self) -> None:
        """Wait for the child to have started, if it was not waited for before.

        Raises:
            WorkerHungError: when it took too long.
            WorkerLostError: when it died.

        """
        if not self._is_ready:
            self._receive(self._start_limit_s, _no_progress)
            self._is_ready = True

    def ask(
        self,
        message: Message,
        *,
        limit_s: float,
        descriptors: Sequence[int] = (),
        progress: Callable[[], int] | None = None,
    ) -> Message:
        """Send ``message`` and wait for the answer.

        Args:
            message: a JSON object.
            limit_s: seconds until the answer; counted anew whenever ``progress`` returns another number.
            descriptors: to send duplicates of.
            progress: how far the child is, in memory that both share.

        Raises:
            WorkerHungError: when the time passed.
            WorkerLostError: when the child died, or answers nonsense.

        """
        self.wait_until_ready()
        try:
            self.channel.send(message, descriptors, limit_s=_MESSAGE_LIMIT_S)
        except OSError as error:
            raise WorkerLostError(self.how_it_ended()) from error
        return self._receive(limit_s, progress or _no_progress)

    def _receive(self, limit_s: float, progress: Callable[[], int]) -> Message:
        reached, deadline = progress(), time.monotonic() + limit_s
        while not self.channel.readable(min(_POLL_S, limit_s)):
            if progress() != reached:
                reached, deadline = progress(), time.monotonic() + limit_s
            elif time.monotonic() > deadline:
                self.kill()
                raise WorkerHungError(f"no result after {limit_s:g} s")
        try:
            return self.channel.receive(limit_s=_MESSAGE_LIMIT_S)
        except (OSError, EOFError, ValueError) as error:
            raise WorkerLostError(self.how_it_ended()) from error

    def how_it_ended(self) -> str:
        """Say how the child ended, and end it: a kernel may have closed the connection and run on."""
        running = not _exits_within(self._process, _EXIT_LIMIT_S)
        self.kill()
        status = self._process.returncode
        if running:
            reason = "broke its connection to the tuner"
        elif status < 0:
            reason = f"killed by {_signal_name(-status)}"
        else:
            reason = f"ended the process with status {status}"
        tail = self.log_tail()
        return f"{reason}: {tail}" if tail else reason

    def log_tail(self) -> str:
        """Last line that the child, or what it ran, printed; nothing in it can steer a terminal."""
        size = os.fstat(self._log_fd).st_size
        text = os.pread(self._log_fd, _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES)).decode(errors="replace")
        lines = text.strip().splitlines()
        last = lines[-1].strip() if lines else ""
        return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in last)

    def kill(self) -> None:
        """End the child and all that it may have started in its process group."""
        _kill(self._process)

    def close(self) -> None:
        """End the child and free what belongs to it."""
        self._end()


def _no_progress() -> int:
    return 0


def _exits_within(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Wait for the child's end, leaving it a zombie so that nobody else gets its process group's number."""
    if process.returncode is not None:
        return True
    deadline = time.monotonic() + limit_s
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(process: subprocess.Popen[bytes], channel: Channel, log_fd: int, grace_s: float, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the parent does not own its children
    with contextlib.suppress(OSError):  # the other side is gone already
        channel.shut_down()
    if grace_s:
        _exits_within(process, grace_s)
    _kill(process)
    channel.close()
    os.close(log_fd)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
