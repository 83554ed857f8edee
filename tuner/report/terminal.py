"""Lines on stdout: plain in a pipe, with bold heads on a terminal; no text from elsewhere can steer that."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tilewright.plain_text import plain


class Heading(str):
    """The head of a table."""

    __slots__ = ()


def terminal_console(stream: TextIO) -> Console | None:
    """Where styled text goes; None when ``stream`` is no terminal, or one that understands no control codes.

    Nothing in a text is markup. ``$NO_COLOR`` is heeded, ``$FORCE_COLOR`` is not: a pipe gets plain lines.
    """
    if not stream.isatty():
        return None
    console = Console(file=stream, force_terminal=True, markup=False, highlight=False, emoji=False)
    return None if console.is_dumb_terminal else console


def print_lines(lines: Iterable[str], *, breaks: bool = True) -> None:
    """Print lines; on a terminal with ``breaks``, those that are too long are broken between words."""
    # A closed stdout is None.
    console = terminal_console(sys.stdout) if sys.stdout else None
    if console is None:
        print("\n".join(map(plain, lines)), flush=True)
        return
    for line in lines:
        text = plain(line)
        parts = _broken(text, console.width) if breaks and cell_len(text) > console.width else [text]
        console.print(Text("\n".join(parts), "bold" if isinstance(line, Heading) else ""), soft_wrap=True)


def _broken(text: str, columns: int) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    if columns <= 2 * len(indent):
        return [text]
    # Paths and keys stay whole, to be copied.
    return textwrap.wrap(text, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def print_source(source: str) -> None:
    """Print a whole source: in a pipe byte for byte, so that it can be compiled."""
    if sys.stdout and sys.stdout.isatty():
        print_lines(source.rstrip("\n").split("\n"), breaks=False)
    else:
        print(source, end="")
