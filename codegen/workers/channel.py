"""Messages between a process and its child: JSON with its length in front, over a socket, file descriptors beside it.

JSON, because a child is not to be trusted once it ran a candidate: nothing that it sends is more than text and numbers.
Standard library only.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 20


class Channel:
    """One end of a connection. Several threads may send only if they take turns; likewise for receiving."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """Descriptor to wait for."""
        return self._end.fileno()

    def readable(self, limit_s: float | None) -> bool:
        """Whether something arrives, or the other side is gone, within ``limit_s`` seconds (None: at some time)."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        return bool(poll.poll(None if limit_s is None else 1000 * limit_s))

    def send(self, message: Message, descriptors: Sequence[int] = (), *, limit_s: float | None = None) -> None:
        """Send one message, and duplicates of ``descriptors`` with it.

        Raises:
            OSError: when the other side is gone, or did not take it within ``limit_s`` seconds (TimeoutError).

        """
        body = json.dumps(message).encode()
        self._end.settimeout(limit_s)
        # The descriptors travel with the length, which is too short to be sent in parts.
        socket.send_fds(self._end, [_LENGTH.pack(len(body))], descriptors)
        self._end.sendall(body)

    def receive(self, *, limit_s: float | None = None) -> Message:
        """Next message. Descriptors that came with it are closed, unopened, by the system.

        Raises:
            EOFError: when the other side is gone.
            ValueError: when what came is no message.
            OSError: when the connection broke, or the message was not complete within ``limit_s`` seconds
                (TimeoutError).

        """
        return self._message(b"", limit_s)

    def receive_with_descriptor(self) -> tuple[Message, list[int]]:
        """Next message from a side that is trusted, and the descriptor that came with it, if one did.

        Raises:
            EOFError: when the other side is gone.
            ValueError: when what came is no message.
            OSError: when the connection broke.

        """
        self._end.settimeout(None)
        begin, descriptors, _, _ = socket.recv_fds(self._end, _LENGTH.size, 1)
        if not begin:
            raise _gone()
        return self._message(begin, None), list(descriptors)

    def shut_down(self) -> None:
        """Tell both sides that nothing more is sent; who waits for a message gets an end."""
        self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptor."""
        self._end.close()

    def _message(self, begin: bytes, limit_s: float | None) -> Message:
        deadline = None if limit_s is None else time.monotonic() + limit_s
        header = begin + self._exactly(_LENGTH.size - len(begin), deadline)
        (length,) = _LENGTH.unpack(header)
        if length > _MAX_BYTES:
            raise ValueError(f"a message of {length} bytes")
        try:
            message = json.loads(self._exactly(length, deadline))
        except RecursionError as error:
            raise ValueError("a message that is nested too deeply") from error
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message

    def _exactly(self, nbytes: int, deadline: float | None) -> bytes:
        parts = []
        while nbytes:
            # One deadline for all parts: otherwise a byte every few seconds would go on for ever.
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError("a message that does not end")
            self._end.settimeout(left_s)
            part = self._end.recv(min(nbytes, _CHUNK_BYTES))
            if not part:
                raise _gone()
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)


def _gone() -> EOFError:
    return EOFError("the other side closed the connection")
