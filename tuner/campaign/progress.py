"""What a person sees while tuning, on stderr: a line per improvement, and on a terminal a bar with the time left."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tilewright.plain_text import plain
from tilewright.tuner.report.terminal import terminal_console
from tilewright.tuner.report.text import format_us, wrapped
from tilewright.tuning_db.records import Outcome

if TYPE_CHECKING:
    from tilewright.tuner.campaign.loop import ProblemResult
    from tilewright.tuner.plan.constraint import Raced

ENDLESS_TRIALS = 1 << 24
"""So many trials mean that only the time is limited."""

_WORDS: dict[str, str] = {
    Outcome.WRONG: "wrong",
    Outcome.BUILD_FAILED: "failed to build",
    Outcome.CRASHED: "crashed",
    Outcome.TIMED_OUT: "timed out",
    Outcome.REJECTED: "rejected",
}
_BAR_COLUMNS = 40
_LEAST_BAR_COLUMNS = 10


class Progress:
    """Reports to ``stream``; silent without one. Seconds count from its creation.

    Use as a context manager, so that a terminal is left as it was found, whatever happens.
    """

    def __init__(self, stream: TextIO | None = sys.stderr) -> None:
        self._stream = stream
        self._console = terminal_console(stream) if stream is not None else None
        self._bar = _Bar(self._console) if self._console is not None else None
        self._begin = time.monotonic()
        self._title = ""
        self._best_us = float("inf")
        self._bests: dict[str, str] = {}
        self._searches = False
        self._effort = Effort(0, math.inf)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.searched()

    def begin(self, trials: int, deadline: float) -> None:
        """Begin a search of ``trials`` in all, that ends at ``deadline`` (monotonic clock) at the latest."""
        self._effort = Effort(trials, deadline)

    def problem(self, title: str, trials: int = 0) -> None:
        """Begin a problem; ``title`` names it in every line that follows. It has ``trials`` already."""
        self._title = title
        self._best_us = float("inf")
        self._effort.counted(title, trials)
        self._searches = True
        self._status(title)

    def searched(self) -> None:
        """Take the bar away: what follows has lines of its own."""
        self._searches = False
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self._say(text, "")

    def built(self, done: int) -> None:
        """Show how many variants of a batch are built."""
        self._status(f"{self._title}  building: {done} done{self._bests.get(self._title, '')}")

    def batch_done(self, result: ProblemResult, trials: int) -> None:
        """Report a batch: a line when there is a new best, else the status."""
        self._effort.counted(self._title, result.trials)
        ranked = result.ranked()
        failures = ", ".join(
            f"{count} {_WORDS[how]}" for how, count in sorted(result.outcomes.items()) if how in _WORDS
        )
        line = f"{self._title}  {result.trials:3d}{f'/{trials}' if trials < ENDLESS_TRIALS else ''}"
        if ranked:
            best = f"  best {format_us(ranked[0].time_us)}"
            default = result.candidates.get(result.default)
            if default:
                best += f"  {default.time_us / ranked[0].time_us:.2f}x default"
            self._bests[self._title] = best
            line += best
        line += f"  {failures}" if failures else ""
        if ranked and ranked[0].time_us < self._best_us:
            self._best_us = ranked[0].time_us
            self._say(line, "bold")
        self._status(line)

    def raced(self, title: str, raced: Raced | None) -> None:
        """Report the last race of a problem."""
        if raced is None:
            self.say(f"{title}  no right default to race against")
        else:
            best, default = raced.best.median_us, raced.default.median_us
            self.say(f"{title}  {len(raced.right)} finalists  best {format_us(best)}  {default / best:.2f}x default")

    def _say(self, text: str, style: str) -> None:
        stamp = f"[{time.monotonic() - self._begin:4.0f}s] "
        if self._console is not None:
            lines = wrapped(stamp + plain(text), self._console.width, indent=len(stamp))
            said = Text("\n".join(lines), style)
            said.stylize("not bold dim", 0, len(stamp))
            self._console.print(said, soft_wrap=True)
        elif self._stream is not None:
            self._stream.write(f"{stamp}{plain(text)}\n")
            self._stream.flush()

    def _status(self, text: str) -> None:
        if self._bar is not None and self._searches:
            self._bar.show(plain(text), self._effort)


@dataclass
class Effort:
    """How much of a search is done, by its trials or its time, whichever is used up first."""

    trials: int
    """Of all problems."""
    deadline: float
    begin: float = field(default_factory=time.monotonic)
    first: dict[str, int] = field(default_factory=dict)
    """Trials of each problem when it was begun: those of earlier runs."""
    now: dict[str, int] = field(default_factory=dict)

    def counted(self, problem: str, trials: int) -> None:
        """Take note of the trials that a problem has."""
        self.first.setdefault(problem, trials)
        self.now[problem] = trials

    @property
    def done(self) -> int:
        """Trials so far."""
        return sum(self.now.values())

    def share(self, now: float) -> float:
        """How much is done of the trials or of the time, whichever is more."""
        by_time = (now - self.begin) / max(self.deadline - self.begin, 1e-9)
        by_trials = self.done / self.trials if self.trials else 0.0
        return min(1.0, max(by_time, by_trials))

    def left_s(self, now: float) -> float | None:
        """Seconds left, as the trials of this run took; None where nothing is known yet."""
        by_time = max(0.0, self.deadline - now)
        made = self.done - sum(self.first.values())
        if not made:
            return by_time if math.isfinite(by_time) else None
        return min(by_time, (now - self.begin) / made * max(0, self.trials - self.done))


class _Bar:
    """Two lines at the foot of a terminal: what goes on, and how far it is.

    They change when something happens and not with the clock: no thread of ours may run while kernels are timed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def show(self, text: str, effort: Effort) -> None:
        """Draw it."""
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
            # A killed process could not show it again.
            self._console.show_cursor(True)
        self._live.update(bar_lines(text, effort, time.monotonic(), self._console.width), refresh=True)

    def stop(self) -> None:
        """Take it away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def bar_lines(text: str, effort: Effort, now: float, columns: int) -> RenderableType:
    """What goes on, and beneath it a bar, the trials and the time left, in a terminal of ``columns``."""
    left_s = effort.left_s(now)
    counted = f"{effort.done}/{effort.trials} trials" if 0 < effort.trials < ENDLESS_TRIALS else f"{effort.done} trials"
    words = [counted, *([] if left_s is None else [f"{_clock(left_s)} left"])]
    tail = "  ".join(words)
    room = columns - len(tail) - 3
    grid = Table.grid(padding=(0, 1))
    cells: list[RenderableType] = [Text(tail, no_wrap=True, overflow="ellipsis")]
    if room >= _LEAST_BAR_COLUMNS:
        cells.insert(0, ProgressBar(total=1.0, completed=effort.share(now), width=min(room, _BAR_COLUMNS)))
    grid.add_row(*cells)
    return Group(Text(text, no_wrap=True, overflow="ellipsis"), grid)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
