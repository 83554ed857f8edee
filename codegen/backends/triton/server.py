"""The compile server: has Triton loaded and warm, and forks a process for every source that is to be compiled.

Answers come in the order in which compiles end, each with its request's number. A process that runs away or is taken
down by LLVM costs its own source and nothing else; the CPU seconds in the answer are those of it and its children.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.codegen.workers.channel import Channel
from tilewright.codegen.workers.child import READY, confine, connect
from tilewright.temporary import temporary_folder

_POLL_S = 0.01


@dataclass
class _Running:
    number: int
    deadline: float
    stopped: str = ""


class Server:
    """Serves the requests that come over ``channel`` until it is closed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._running: dict[int, _Running] = {}
        self._warm: set[str] = set()

    def serve(self) -> None:
        """Answer until the other side is gone, then kill what runs."""
        try:
            while True:
                if self._channel.readable(_POLL_S if self._running else None):
                    self._take(self._channel.receive())
                self._reap()
        except EOFError:
            pass
        finally:
            for pid in self._running:
                _kill(pid)

    def _take(self, request: dict[str, Any]) -> None:
        if "stop" in request:
            for pid, each in self._running.items():
                if each.number == request["stop"]:
                    self._stop(pid, each, "on request")
            return
        self._warm_up(request["target"])
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._channel.close()
            _child(request, parent)
        self._running[pid] = _Running(request["number"], time.monotonic() + request["limit_s"])

    def _warm_up(self, target: list[Any]) -> None:
        """Once for every target: compile a small kernel in this process, which all that are forked later profit from.

        Where that fails, the real sources will say why.
        """
        name = json.dumps(target)
        if name in self._warm:
            return
        self._warm.add(name)
        from tilewright.codegen.backends.triton import warm as triton_warm
        from tilewright.codegen.backends.triton.compile import compile_entries

        stdout = os.dup(1)
        try:
            with temporary_folder() as folder:
                compile_entries(Path(triton_warm.__file__), [triton_warm.ENTRY], tuple(target), folder)
        except Exception:
            traceback.print_exc()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)

    def _reap(self) -> None:
        for pid, each in list(self._running.items()):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if not ended:
                if not each.stopped and time.monotonic() > each.deadline:
                    self._stop(pid, each, "because it took too long")
                continue
            del self._running[pid]
            answer = {
                "number": each.number,
                "status": os.waitstatus_to_exitcode(status),
                "stopped": each.stopped,
                "cpu_s": usage.ru_utime + usage.ru_stime,
            }
            self._channel.send(answer)

    def _stop(self, pid: int, each: _Running, why: str) -> None:
        each.stopped = why
        _kill(pid)


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its own group yet
        os.kill(pid, signal.SIGKILL)


def _child(request: dict[str, Any], parent: int) -> None:
    """Compile in a session of its own, within its limits; never returns."""
    status = 1
    try:
        os.setsid()
        folder = Path(request["folder"])
        log = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        confine(parent, cpu_s=request["cpu_limit_s"], address_bytes=request["memory_limit_bytes"])
        from tilewright.codegen.backends.triton.compile import compile_entries

        compile_entries(Path(request["source"]), request["entries"], tuple(request["target"]), folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serve until the channel closes, and not until the parent ends, which to the system is a thread of it."""
    channel, _ = connect(dies_with_parent=False)
    import triton  # noqa: F401  (loaded for all that are forked)

    channel.send(READY)
    Server(channel).serve()


if __name__ == "__main__":
    main()
