"""What goes into an evaluation and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.codegen.backends.base import BuiltFile
from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.space import Config
from tilewright.tuning_db.records import Checked, Outcome, Timing


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel as the builder left it."""

    key: str
    """Identity of the kernel: equal keys, equal bytes. A key is checked once."""
    path: Path
    """The shared object, or the folder of a GPU kernel's binaries."""
    recipe: Recipe
    config: Config = field(default_factory=lambda: Config({}), repr=False)
    """That it was rendered from; what is predicted or emulated depends on it."""
    files: tuple[BuiltFile, ...] = field(default=(), repr=False)
    """The artifacts, in the order of the recipe's launches."""

    @property
    def facts(self) -> tuple[EntryFacts, ...]:
        """Read from the binaries of a GPU kernel, by launch."""
        return tuple(file.facts for file in self.files if file.facts is not None)


@dataclass(frozen=True)
class Evaluation:
    """How one kernel did on one problem.

    With ``Outcome.OK`` the times are set, in microseconds; with every other outcome ``message`` says in one sentence
    what went wrong. ``low_us`` and ``high_us`` bound the median with 95 % confidence; they are None with fewer than
    six samples, which do not carry an interval. Sample i of all kernels of a batch comes from the same moment and
    the same data; kernels that were clearly slower have fewer samples.
    A prediction has no samples; its ``low_us`` and ``high_us`` say how far off the model may be.
    """

    kernel_key: str
    outcome: Outcome
    message: str = ""
    error: float | None = None
    """Largest relative error seen, max |out - reference| / max |reference|; None when no run finished."""
    samples_us: tuple[float, ...] = field(default=(), repr=False)
    timing: Timing = "measured"
    """How the time is known, where there is one."""
    checked: Checked = "device"
    """How it is known that the kernel is right, where it is."""
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict, repr=False)
    """Under which it was timed: what is known of the device's clocks and the like, and how calls were timed."""


@dataclass(frozen=True)
class TimeSpent:
    """Wall seconds that an evaluator has used, by purpose; the difference of two says what a call cost."""

    preparing_s: float = 0.0
    """Making inputs and references, packing weights."""
    checking_s: float = 0.0
    measuring_s: float = 0.0

    def __sub__(self, earlier: TimeSpent) -> TimeSpent:
        """What was used since ``earlier``."""
        return TimeSpent(
            self.preparing_s - earlier.preparing_s,
            self.checking_s - earlier.checking_s,
            self.measuring_s - earlier.measuring_s,
        )
