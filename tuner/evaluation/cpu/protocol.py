"""Messages between evaluator and worker: JSON with a length in front, file descriptors beside it.

JSON, because the worker is not to be trusted once it ran a candidate. Standard library only.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 1 << 26
_MAX_DESCRIPTORS = 1


def send(channel: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message, and duplicates of ``descriptors`` with it.

    Raises:
        OSError: when the other side is gone.

    """
    body = json.dumps(message).encode()
    # The descriptors travel with the length, which is too short to be sent in parts.
    socket.send_fds(channel, [_LENGTH.pack(len(body))], descriptors)
    channel.sendall(body)


def receive(channel: socket.socket) -> tuple[Message, list[int]]:
    """Next message, with the descriptors that came with it.

    Raises:
        EOFError: when the other side is gone.
        ValueError: when what came is no message.
        OSError: when the connection broke.

    """
    header, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, _MAX_DESCRIPTORS)
    header += _receive_exactly(channel, _LENGTH.size - len(header))
    (length,) = _LENGTH.unpack(header)
    if length > _MAX_BYTES:
        raise ValueError(f"a message of {length} bytes")
    message = json.loads(_receive_exactly(channel, length))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message, list(descriptors)


def _receive_exactly(channel: socket.socket, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        part = channel.recv(min(nbytes, 1 << 20))
        if not part:
            raise EOFError("the other side closed the connection")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
