"""What the loop asks of an evaluator, whether it measures on this machine or predicts for another."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from tilewright.codegen.ops.problem import Problem
from tilewright.tuner.evaluation.checking import PrecisionError
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation, TimeSpent
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuning_db.records import Checked


class Evaluator(Protocol):
    """Evaluates kernels of one signature. A context manager: it may have processes and memory of its own."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def spent(self) -> TimeSpent:
        """Wall seconds used so far, by purpose."""

    def evaluate(
        self, kernels: Sequence[BuiltKernel], problem: Problem, *, budget_s: float, finalists: bool = False
    ) -> list[Evaluation]:
        """One evaluation per kernel, in order.

        ``finalists`` get every check there is; of others a costly one may be left out.
        """

    def checked(self, kernel_key: str) -> Checked:
        """How far a built kernel was checked so far."""

    def measure_noise(self, kernel: BuiltKernel, problem: Problem, *, budget_s: float) -> Ratio:
        """What becomes of two equal times: a kernel against itself."""

    def precision_error(self, problem: Problem, precision: str) -> PrecisionError:
        """What storing weights in ``precision`` does to the op's output."""
