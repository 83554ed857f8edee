"""The tuner's side of the compile server: start it, hand it sources from any thread, bury it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tilewright.codegen.backends.base import Source
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.workers.process import ONE_THREAD, start_python
from tilewright.errors import TilewrightError

_START_LIMIT_S = 120.0
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
            if self._server is None or self._server.lost:
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
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self.lost = False
        self._channel, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile(prefix="tilewright-compiler-")  # noqa: SIM115  (open as long as the server)
        kept = {n: v for n, v in os.environ.items() if not n.startswith("TRITON_") or n in _OWN_SETTINGS}
        with theirs:
            self._process = start_python(
                "tilewright.codegen.backends.triton.server",
                [theirs.fileno()],
                log=self._log,
                handles=[theirs.fileno()],
                environment={**kept, **ONE_THREAD},
            )
        self._end = weakref.finalize(self, _end, self._process, self._channel, self._log)
        self._channel.settimeout(_START_LIMIT_S)
        try:
            hello = self._channel.recv(16)
        except OSError:
            hello = b""
        if not hello:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            self._end()
            raise TilewrightError(f"the compile server did not start: {lines[-1] if lines else 'it said nothing'}")
        self._channel.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, number: int, message: dict[str, Any]) -> Future[dict[str, Any]]:
        """Send a request; the future holds its answer."""
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            self._waiting[number] = answer
        self.say(message)
        return answer

    def say(self, message: dict[str, Any]) -> None:
        """Send a line; who waits for an answer hears of it when the server is gone."""
        try:
            with self._lock:
                self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._lose()

    def close(self) -> None:
        """End the server."""
        self._end()
        self._lose()

    def _listen(self) -> None:
        with self._channel.makefile("rb") as lines:
            try:
                for line in lines:
                    answer = json.loads(line)
                    with self._lock:
                        waiting = self._waiting.pop(answer["number"])
                    waiting.set_result(answer)
            except (OSError, ValueError, KeyError):
                pass  # what it sends cannot be relied on any more: as good as gone
        self._lose()

    def _lose(self) -> None:
        with self._lock:
            self.lost = True
            waiting, self._waiting = list(self._waiting.values()), {}
        for each in waiting:
            each.set_exception(CompileServerError("the compile server ended"))


def _end(process: subprocess.Popen[bytes], channel: socket.socket, log: IO[bytes]) -> None:
    """The server kills what it compiles when its channel closes."""
    with contextlib.suppress(OSError):  # it is gone already
        channel.shutdown(socket.SHUT_RDWR)
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    channel.close()
    log.close()
