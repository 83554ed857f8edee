"""The child's side: confined, it answers its parent until that closes the connection. Standard library only."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

from tilewright.codegen.workers.channel import Channel, Message

READY: Message = {"ready": True}
"""What a child says first, once it can be asked."""
_PR_SET_PDEATHSIG = 1

Answer = Callable[[Message, list[int]], Message]
"""Answers a message and the descriptors that came with it, which it has to close."""


def confine(
    parent: int | None,
    *,
    file_bytes: int | None = None,
    cpu_s: int | None = None,
    address_bytes: int | None = None,
) -> None:
    """Limit this process: no core file, signals as the system means them, and what is given.

    Args:
        parent: process to die with; in truth with the thread that started this one. None: with none.
        file_bytes: largest file that may be written, logs among them.
        cpu_s: CPU seconds.
        address_bytes: of address space.

    Raises:
        SystemExit: when the parent is gone already.

    """
    if parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the parent is gone")
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: address_bytes,
    }
    for kind, most in limits.items():
        if most is not None:
            resource.setrlimit(kind, (most, most))
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def connect(*, dies_with_parent: bool = True, file_bytes: int | None = None) -> tuple[Channel, list[str]]:
    """Confine this process, which :class:`~tilewright.codegen.workers.process.WorkerProcess` started.

    Returns the connection to the parent, and the arguments of the job.
    """
    parent, descriptor, *arguments = sys.argv[1:]
    confine(int(parent) if dies_with_parent else None, file_bytes=file_bytes)
    return Channel(socket.socket(fileno=int(descriptor))), arguments


def serve(channel: Channel, answer: Answer) -> None:
    """Say that this process is ready, then answer one message after another until the parent is gone."""
    channel.send(READY)
    while True:
        try:
            message, descriptors = channel.receive_with_descriptor()
        except EOFError:
            return
        channel.send(answer(message, descriptors))
