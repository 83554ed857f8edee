"""What a person sees while tuning: stderr, one line per improvement, and a status line on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from tilewright.tuner.report.text import format_us
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


class Progress:
    """Reports to ``stream``; silent without one. Seconds count from its creation."""

    def __init__(self, stream: TextIO | None = sys.stderr) -> None:
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._begin = time.monotonic()
        self._title = ""
        self._best_us = float("inf")
        self._status_length = 0

    def problem(self, title: str) -> None:
        """Begin a problem; ``title`` names it in every line that follows."""
        self._title = title
        self._best_us = float("inf")

    def say(self, text: str) -> None:
        """Print one line."""
        self._clear()
        self._print(f"[{self._seconds:4.0f}s] {text}\n")

    def built(self, done: int) -> None:
        """Show how many variants of a batch are built."""
        self._status(f"[{self._seconds:4.0f}s] {self._title}  building: {done} done")

    def batch_done(self, result: ProblemResult, trials: int) -> None:
        """Report a batch: a line when there is a new best, else the status."""
        ranked = result.ranked()
        failures = ", ".join(
            f"{count} {_WORDS[how]}" for how, count in sorted(result.outcomes.items()) if how in _WORDS
        )
        line = f"{self._title}  {result.trials:3d}{f'/{trials}' if trials < ENDLESS_TRIALS else ''}"
        if ranked:
            line += f"  best {format_us(ranked[0].time_us)}"
            default = result.candidates.get(result.default)
            if default:
                line += f"  {default.time_us / ranked[0].time_us:.2f}x default"
        line += f"  {failures}" if failures else ""
        if ranked and ranked[0].time_us < self._best_us:
            self._best_us = ranked[0].time_us
            self.say(line)
        else:
            self._status(f"[{self._seconds:4.0f}s] {line}")

    def raced(self, title: str, raced: Raced | None) -> None:
        """Report the last race of a problem."""
        if raced is None:
            self.say(f"{title}  no right default to race against")
        else:
            best, default = raced.best.median_us, raced.default.median_us
            self.say(f"{title}  {len(raced.right)} finalists  best {format_us(best)}  {default / best:.2f}x default")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._begin

    def _status(self, text: str) -> None:
        if self._live:
            self._clear()
            self._print(text)
            self._status_length = len(text)

    def _clear(self) -> None:
        if self._status_length:
            self._print("\r" + " " * self._status_length + "\r")
            self._status_length = 0

    def _print(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()
