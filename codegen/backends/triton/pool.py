"""The tuner's side of the compile server: start it, hand it sources from any thread, bury it."""

from __future__ import annotations

import itertools
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from tilewright.codegen.backends.base import Source
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.process import ONE_THREAD, WorkerLostError, WorkerProcess
from tilewright.errors import TilewrightError

_START_LIMIT_S = 120.0
_END_LIMIT_S = 5.0
_OWN_SETTINGS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_LIBDEVICE_PATH")
"""Environment variables of Triton's that keep their meaning; others would change what is compiled, or where it lies."""


@dataclass(frozen=True)
class Limits:
    """Of one compile."""

    wall_s: float = 60.0
    cpu_s: int = 60
    memory_bytes: int = 6 << 30
    """Of address space, of which LLVM reserves more than it uses."""


@dataclass(frozen=True)
class Finished:
    """How a compile ended."""

    status: int
    """0, an exit status, or minus a signal's number."""
    stopped: str
    """Why it was killed; empty when it was not."""
    cpu_s: float


class CompileServerError(Exception):
    """The server ended, and with it all that it was compiling."""


class CompilePool:
    """Compiles Triton sources in processes that need not wait for Python and Triton to start.

    Safe to use from several threads. The server is started with the first source, and again after it was lost.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._server: _Connection | None = None

    def compile(self, source: Path, request: Source, arch: GpuArch, folder: Path, stop: threading.Event) -> Finished:
        """Compile the entries of ``request``, whose text lies at ``source``, into ``folder``.

        Raises:
            CompileServerError: when the server was lost.
            TilewrightError: when it cannot be started.

        """
        number = next(self._numbers)
        message = {
            "number": number,
            "source": str(source),
            "entries": [entry.to_dict() for entry in request.entries],
            "target": list(arch.triton_target),
            "folder": str(folder),
            "limit_s": self.limits.wall_s,
            "cpu_limit_s": self.limits.cpu_s,
            "memory_limit_bytes": self.limits.memory_bytes,
        }
        with self._lock:
            if self._server is not None and self._server.lost:
                self._server.close()
                self._server = None
            if self._server is None:
                self._server = _Connection()
            server = self._server
        answer = server.ask(number, message)
        while True:
            try:
                found = answer.result(timeout=0.1)
                return Finished(found["status"], found["stopped"], found["cpu_s"])
            except TimeoutError:
                if stop.is_set():
                    server.say({"stop": number})

    def close(self) -> None:
        """End the server and what it compiles."""
        with self._lock:
            if self._server is not None:
                self._server.close()
                self._server = None


class _Connection:
    """A running server."""

    def __init__(self) -> None:
        self._waiting: dict[int, Future[Message]] = {}
        self._lock = threading.Lock()
        self.lost = False
        kept = {n: v for n, v in os.environ.items() if not n.startswith("TRITON_") or n in _OWN_SETTINGS}
        # The server kills what it compiles when its channel closes.
        self._worker = WorkerProcess(
            "tilewright.codegen.backends.triton.server",
            start_limit_s=_START_LIMIT_S,
            environment={**kept, **ONE_THREAD},
            grace_s=_END_LIMIT_S,
        )
        try:
            self._worker.wait_until_ready()
        except WorkerLostError as error:
            self._worker.close()
            raise TilewrightError(f"the compile server did not start: {error}") from error
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, number: int, message: Message) -> Future[Message]:
        """Send a request; the future holds its answer."""
        answer: Future[Message] = Future()
        with self._lock:
            self._waiting[number] = answer
        self.say(message)
        return answer

    def say(self, message: Message) -> None:
        """Send a message; who waits for an answer hears of it when the server is gone."""
        try:
            with self._lock:
                self._worker.channel.send(message)
        except OSError:
            self._lose()

    def close(self) -> None:
        """End the server."""
        self._worker.close()
        self._lose()

    def _listen(self) -> None:
        try:
            while True:
                answer = self._worker.channel.receive()
                with self._lock:
                    waiting = self._waiting.pop(answer["number"])
                waiting.set_result(answer)
        except (OSError, EOFError, ValueError, KeyError):
            self._lose()  # what it sends cannot be relied on any more: as good as gone

    def _lose(self) -> None:
        with self._lock:
            self.lost = True
            waiting, self._waiting = list(self._waiting.values()), {}
        for each in waiting:
            each.set_exception(CompileServerError("the compile server ended"))
