"""How numbers, shapes and tables are written for people."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilewright.plain_text import plain
from tilewright.tuner.report.terminal import Heading

_UNITS = ((1.0, "us"), (1e3, "ms"), (1e6, "s"))
_GAP = "  "
_NUMBER = re.compile(r"-|(n=|>)?\d+(\.\d+)?(e-\d+)?([-%x, ].*)?")
"""A number with its unit or interval, or none; not a key, which may begin with a digit, too."""


def format_us(time_us: float) -> str:
    """Time with three digits and a unit that fits it."""
    scale, unit = _unit(time_us)
    return f"{_three_digits(time_us / scale)} {unit}"


def format_interval(median_us: float, low_us: float | None, high_us: float | None, samples: int = 0) -> str:
    """Interval of a time, in the unit that ``format_us`` gives its median; how many samples do not carry one."""
    if low_us is None or high_us is None:
        return no_interval(samples) if samples else "-"
    scale, _ = _unit(median_us)
    return f"{_three_digits(low_us / scale)}-{_three_digits(high_us / scale)}"


def format_ratio(median: float, low: float | None, high: float | None, samples: int = 0) -> str:
    """Ratio and its interval; how many samples do not carry one."""
    if low is None or high is None:
        return f"{_three_digits(median)}x {no_interval(samples) if samples else ''}".rstrip()
    return f"{_three_digits(median)}x {_three_digits(low)}-{_three_digits(high)}"


def no_interval(samples: int) -> str:
    """In place of an interval: that ``samples`` are too few for one."""
    return f"n={samples}, no interval"


def format_shape(signature: Mapping[str, Any]) -> str:
    """One line for the JSON form of a signature: dtypes in one word when they are equal, nothing for what is off."""
    dtypes = {name.removesuffix("_dtype"): value for name, value in signature.items() if name.endswith("_dtype")}
    sizes = {name: value for name, value in signature.items() if name != "op" and not name.endswith("_dtype")}
    words = [f"{name}={value}" for name, value in sizes.items() if value != "none" and value is not False]
    same = len(set(dtypes.values())) == 1
    kinds = [*dict.fromkeys(dtypes.values())] if same else [f"{name}={value}" for name, value in dtypes.items()]
    return " ".join([str(signature["op"]), *words, *kinds])


def format_threads(count: int) -> str:
    """Count with its word."""
    return f"{count} thread{'' if count == 1 else 's'}"


def labelled(label: str, text: str, *, width: int | None, indent: int = 11) -> list[str]:
    """A labelled line of words that begin in column ``indent``, broken to fit ``width``."""
    return wrapped(f"{label:<{indent}}{text}", width, indent=indent)


def wrapped(text: str, width: int | None, *, indent: int = 2) -> list[str]:
    """``text`` in lines that fit ``width``, all but the first indented; one line where that leaves too little room."""
    if width is None or width <= 2 * indent:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, or ``$COLUMNS``; None where lines may be of any length."""
    # A closed stdout is None.
    if os.environ.get("COLUMNS", "").isdecimal() or (sys.stdout and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> list[str]:
    """Aligned columns, numbers to the right; the first line is a :class:`~tilewright.tuner.report.terminal.Heading`.

    What does not fit into ``width`` goes into further tables below, which repeat the first column.
    """
    lines = [list(map(plain, line)) for line in (head, *rows)]
    columns = [[line[i] for line in lines] for i in range(len(head))]
    parts: list[list[list[str]]] = []
    for column in columns[1:]:
        if parts and (width is None or _width([*parts[-1], column]) <= width):
            parts[-1].append(column)
        else:
            parts.append([columns[0], column])
    return [line for i, part in enumerate(parts or [columns[:1]]) for line in ([""] if i else []) + _written(part)]


def _written(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of one table, its head first."""
    grid = Table(box=None, padding=(0, len(_GAP), 0, 0), pad_edge=False, show_header=False)
    for column in columns:
        numbers = all(map(_NUMBER.fullmatch, column[1:]))
        grid.add_column(no_wrap=True, justify="right" if numbers else "left")
    for cells in zip(*columns, strict=True):
        grid.add_row(*map(Text, cells))
    # Wide enough for rich to shorten nothing.
    console = Console(file=io.StringIO(), width=_width(columns) + len(_GAP), color_system=None)
    lines = ["".join(piece.text for piece in line).rstrip() for line in console.render_lines(grid, pad=False)]
    return [Heading(lines[0]), *lines[1:]]


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes, where some characters take two."""
    return sum(max(map(cell_len, column)) for column in columns) + len(_GAP) * (len(columns) - 1)


def _unit(time_us: float) -> tuple[float, str]:
    """The largest unit in which at least 1 would be shown."""
    return next(((scale, unit) for scale, unit in reversed(_UNITS) if time_us >= 0.9995 * scale), _UNITS[0])


def _three_digits(value: float) -> str:
    if not math.isfinite(value) or value <= 0:
        return f"{value:.3g}"
    # Rounded first: 9.996 has its first digit before the tens only then.
    exponent = math.floor(math.log10(float(f"{value:.3g}")))
    return f"{value:.{max(0, 2 - exponent)}f}"
