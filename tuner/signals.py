"""Ctrl-C, SIGTERM and SIGHUP: a command ends in a sentence, with the exit code that shells give to the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TOGETHER_S = 1.0
"""Service managers send two signals at once; a later one is somebody who does not want to wait."""


class Signals:
    """What a command does when it is told to end: at once while it starts, then as KeyboardInterrupt.

    Starting means importing, which takes seconds: an exception that is raised there ends in whatever the library that
    is imported makes of it, and nothing is there yet to tidy up.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._number = signal.SIGINT
        self._told_s: float | None = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Answer signals within; those that were ignored (``nohup``) still are, and only the main thread hears any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _ENDING}
        heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in heeded:
            signal.signal(number, self._end)
        try:
            yield
        finally:
            for number in heeded:
                signal.signal(number, before[number])

    def begin(self) -> None:
        """From now on there is something to tidy up."""
        self._has_begun = True

    @property
    def exit_code(self) -> int:
        """130, 143 or 129."""
        return 128 + self._number

    def __str__(self) -> str:
        return "interrupted" if self._number == signal.SIGINT else f"interrupted by {self._number.name}"

    def _end(self, number: int, frame: FrameType | None) -> None:
        del frame
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < _TOGETHER_S:
            return
        is_first, self._told_s, self._number = self._told_s is None, now_s, signal.Signals(number)
        if is_first and self._has_begun:
            raise KeyboardInterrupt
        when = "before it began" if is_first else "again, and ends at once"
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, f"\ntune: {self} {when}\n".encode())
        os._exit(self.exit_code)
