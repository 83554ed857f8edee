"""A target: a device to tune for, what evaluates kernels for it, and how what was found is shown.

The campaign and the commands ask a target, never what kind of arch they have to do with. A new one (a GPU that is
there, another machine) is a module beside this one and a registration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from tilewright.codegen.backends.registry import Builders
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.space import Space
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.search import Prior
from tilewright.tuner.targets.location import Location
from tilewright.tuning_db.records import DeviceRecord, Timing
from tilewright.tuning_db.store import Store

if TYPE_CHECKING:  # a campaign is run for a target
    from tilewright.tuner.campaign.campaign import Report, Request
    from tilewright.tuner.campaign.progress import Progress


@dataclass(frozen=True)
class Wishes:
    """What the user said about the device, if anything."""

    device: str | None = None
    """Name of a product of the arch."""
    threads: int | None = None
    """Of a kernel."""
    predict: bool = False
    """Whether nothing is to be timed, though the device is there."""


@dataclass(frozen=True)
class DefaultBudget:
    """What a run may take where the user does not say."""

    trials: int
    """Per problem."""
    time_s: float
    per_op: bool
    """Whether ``time_s`` is for every op; else all ops of an arch share it."""
    trial_s: float
    """What a trial usually takes, for estimates."""


MEASURING = DefaultBudget(trials=60, time_s=100.0, per_op=True, trial_s=0.5)
"""Where kernels are timed, one after the other."""
COMPILING = DefaultBudget(trials=40, time_s=480.0, per_op=False, trial_s=1.5)
"""Where they are compiled and predicted."""


class Shown(Protocol):
    """What is printed of finished runs."""

    @property
    def reports(self) -> Sequence[Report]:
        """Of the runs."""

    def lines(self) -> list[str]:
        """For people."""

    def document(self) -> dict[str, Any]:
        """The same as JSON."""


class Target(ABC):
    """One device, to be closed when all is tuned; a context manager."""

    budget: ClassVar[DefaultBudget]
    finals: ClassVar[str]
    """What the last step does, in words."""
    timing: ClassVar[Timing]
    """How its evaluator knows times."""
    compiles_beside: ClassVar[bool] = False
    """Whether compilers may run while kernels are timed, without disturbing them."""

    def __init__(self, arch: Arch, device: DeviceRecord, threads: int) -> None:
        self.arch = arch
        """That kernels are built for."""
        self.device = device
        """As the database keeps it."""
        self.location = Location(device.key, threads)
        self.builders = Builders(arch)
        """By language."""

    @classmethod
    @abstractmethod
    def find(cls, arch: Arch, wishes: Wishes, warn: Callable[[str], None]) -> Self | None:
        """The target that is meant; None where there is none of this kind for ``arch`` here, and another may do.

        Raises:
            TilewrightError: for wishes that it cannot grant.

        """

    @abstractmethod
    def evaluator(
        self, op: OpDeclaration[Any, Any], signature: Signature, precisions: Sequence[str], seed: int
    ) -> Evaluator:
        """Evaluator for kernels of ``signature`` in ``precisions``."""

    def priors(self, op: OpDeclaration[Any, Any], problem: Problem, space: Space) -> Iterator[Prior]:
        """What is known of ``space`` before anything is built; by default nothing."""
        del op, problem, space
        yield from ()

    def lack(self, template: Template[Any]) -> str | None:
        """What ``template`` lacks to be evaluated, following on its name in a sentence; None: nothing."""
        del template
        return None

    def begin(self, progress: Progress) -> None:
        """What is done once, before the first run."""
        del progress

    def prove(self, request: Request, report: Report, store: Store, progress: Progress) -> None:
        """Put the plans of a run to the test, where that can be done; what becomes of them is stored."""
        del request, report, store, progress

    @abstractmethod
    def findings(
        self, runs: Sequence[tuple[Request, Report]], model: ModelShape | None, database: str
    ) -> Sequence[Shown]:
        """What is shown of finished runs, of which there is at least one.

        Args:
            runs: in the order in which they were made.
            model: of all of them; None where problems were given one by one.
            database: its name.

        """

    def close(self) -> None:
        """End what was started."""
        self.builders.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
