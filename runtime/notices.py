"""What the runtime tells about not serving a tuned kernel: one clear warning per cause, never an exception."""

from __future__ import annotations

import sys
import warnings

from tilewright.plain_text import plain, without_passwords

_PACKAGE_ROOT = __name__.partition(".")[0] + "."
_said: set[str] = set()


class TilewrightWarning(UserWarning):
    """A tuned kernel could not be served; the result is correct, but computed by plain torch."""


def warn_once(message: str) -> None:
    """Warn with ``message`` (which names the signature and the cause), once in this process.

    The warning points at the first caller outside this package.
    """
    message = plain(without_passwords(message))
    if message in _said:
        return
    _said.add(message)
    warnings.warn(message, TilewrightWarning, stacklevel=_frames_to_caller())


def forget_warnings() -> None:
    """Let everything be warned of again."""
    _said.clear()


def _frames_to_caller() -> int:
    """``stacklevel`` for :func:`warn_once` that names the line of the user, not one of ours."""
    level = 2
    frame = sys._getframe(level)  # noqa: SLF001 - the documented way to walk a stack cheaply
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE_ROOT):
        frame = frame.f_back
        level += 1
    return level
