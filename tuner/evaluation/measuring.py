"""What evaluators that run kernels have in common: they check, then race those that are right."""

from __future__ import annotations

import contextlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation, TimeSpent
from tilewright.tuner.evaluation.racing import RaceRules
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES, Ratio, paired_ratio
from tilewright.tuning_db.records import Checked, Outcome

_FINAL_RULES = RaceRules(least_samples=MIN_SAMPLES, overtime=1.0)
"""Of races that decide, and whose medians are shown."""


class Data(Protocol):
    """A problem ready to be run."""

    @property
    def problem(self) -> Problem:
        """That it is of."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""


D = TypeVar("D", bound=Data)


class MeasuringEvaluator(ABC, Generic[D]):
    """Checks and measures kernels of one signature where they run, in a worker process that they may ruin.

    Inputs are made when a problem is first seen, all from ``seed``. Not thread-safe: use it from the thread that
    created it.

    Args:
        op: the op.
        signature: of all kernels and problems.
        seed: of all data and of the order of races.
        room_bytes: for problems that are kept for when they are asked for again.

    """

    def __init__(self, op: OpDeclaration[Any, Any], signature: Signature, *, seed: int, room_bytes: float) -> None:
        self._op = op
        self._signature = signature
        self._seed = seed
        self._order = random.Random(seed)
        self._room_bytes = room_bytes
        self._spent = TimeSpent()
        self._verdicts: dict[tuple[str, str], Evaluation] = {}
        self._problems: dict[str, D] = {}
        self._awkward: tuple[D, ...] = ()
        """Small problems of this signature's kind, that a kernel must get right before it is timed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the worker and free all memory."""

    @property
    @abstractmethod
    def worker_pid(self) -> int | None:
        """Process that runs the kernels; None when there is none at the moment."""

    @property
    def spent(self) -> TimeSpent:
        """Wall seconds used so far."""
        return self._spent

    def evaluate(
        self,
        kernels: Sequence[BuiltKernel],
        problem: Problem,
        *,
        budget_s: float,
        finalists: bool = False,
    ) -> list[Evaluation]:
        """Check every kernel of ``kernels`` and race those that are right, interleaved; one evaluation each, in order.

        Sample i of every raced kernel comes from the same moment and the same data (unless their weight layouts
        together exceed the memory), so that :func:`paired_ratio` of two of them is meaningful.

        Args:
            kernels: kernels of this evaluator's signature.
            problem: what to measure.
            budget_s: wall seconds for the race; checking comes on top, and every kernel is timed at least once.
            finalists: whether each should be timed six times at least, in twice the budget if need be, so that medians
                have intervals. All checks are made of every kernel.

        Raises:
            TilewrightError: when the problem does not fit the memory, or no worker can be started.

        """
        data = self._data(problem)
        evaluations = [self._check(kernel, data) for kernel in kernels]
        racers = [index for index, evaluation in enumerate(evaluations) if evaluation.outcome is Outcome.OK]
        for group in self._groups([kernels[index] for index in racers]):
            members = [racers[position] for position in group]
            raced = self._race(
                [kernels[index] for index in members],
                [evaluations[index] for index in members],
                data,
                budget_s=budget_s * len(members) / len(racers),
                rules=_FINAL_RULES if finalists else RaceRules(),
            )
            for index, evaluation in zip(members, raced, strict=True):
                evaluations[index] = evaluation
        return evaluations

    def checked(self, kernel_key: str) -> Checked:
        """How far a built kernel was checked so far: here, or not at all."""
        checks = [verdict.outcome for (key, _), verdict in self._verdicts.items() if key == kernel_key]
        return "device" if checks and all(each is Outcome.OK for each in checks) else "compiled"

    def measure_noise(self, kernel: BuiltKernel, problem: Problem, *, budget_s: float) -> Ratio:
        """Race ``kernel`` against itself: what this machine makes of two equal times.

        Raises:
            TilewrightError: when the kernel is not right, or does not survive.

        """
        data = self._data(problem)
        evaluation = self._check(kernel, data)
        twins = [evaluation, evaluation]
        if evaluation.outcome is Outcome.OK:
            twins = self._race(
                [kernel] * 2, twins, data, budget_s=budget_s, rules=replace(_FINAL_RULES, eliminate=False)
            )
        for twin in twins:
            if twin.outcome is not Outcome.OK:
                raise TilewrightError(
                    f"the noise cannot be measured with kernel {kernel.key}, which is no good: {twin.message}"
                )
        return paired_ratio(twins[0].samples_us, twins[1].samples_us)

    @abstractmethod
    def _make_data(self, problem: Problem, *, rotate: bool) -> D:
        """Inputs and outputs; with ``rotate``, enough sets of them to exceed the cache."""

    @abstractmethod
    def _release(self, data: D) -> None:
        """Free the memory of a problem."""

    @abstractmethod
    def _obstacle(self, kernel: BuiltKernel) -> str | None:
        """Why ``kernel`` cannot be run here at all; None when it can."""

    @abstractmethod
    def _refusal(self, kernel: BuiltKernel, data: D) -> str | None:
        """Why a guard of ``kernel`` refuses the problem; None when none does."""

    @abstractmethod
    def _prepare_reference(self, data: D, precision: str) -> None:
        """Have what must come out of a problem in ``precision``."""

    @abstractmethod
    def _check_on(self, kernel: BuiltKernel, data: D, *, awkward: bool) -> Evaluation:
        """Whether ``kernel`` is right on one problem; the awkward ones get every check there is."""

    @abstractmethod
    def _groups(self, kernels: Sequence[BuiltKernel]) -> list[list[int]]:
        """Split indices into ``kernels`` into groups whose data fit the memory together, in order."""

    @abstractmethod
    def _race(
        self,
        kernels: Sequence[BuiltKernel],
        checked: Sequence[Evaluation],
        data: D,
        *,
        budget_s: float,
        rules: RaceRules,
    ) -> list[Evaluation]:
        """``checked`` completed by times, or by why there are none."""

    def _check(self, kernel: BuiltKernel, data: D) -> Evaluation:
        """Whether ``kernel`` is right on the awkward problems and on this one; every problem once per kernel."""
        if obstacle := self._obstacle(kernel):
            return Evaluation(kernel.key, Outcome.REJECTED, obstacle)
        if refused := self._refusal(kernel, data):
            return Evaluation(kernel.key, Outcome.REJECTED, f"a guard refuses the problem: {refused}")
        evaluation = Evaluation(kernel.key, Outcome.OK)
        for each in (*self._awkward, data):
            self._prepare_reference(each, kernel.recipe.precision)
        for checked, awkward in (*((each, True) for each in self._awkward), (data, False)):
            if self._refusal(kernel, checked):
                continue  # The runtime falls back there.
            identity = (kernel.key, checked.problem.key)
            if identity not in self._verdicts:
                self._verdicts[identity] = self._check_on(kernel, checked, awkward=awkward)
            evaluation = self._verdicts[identity]
            if evaluation.outcome is not Outcome.OK:
                break
        return evaluation

    def _data(self, problem: Problem) -> D:
        """Data of a problem to measure; what was used least recently makes room."""
        key = problem.key
        data = self._problems.pop(key, None)
        if data is None:
            with self._clock("preparing_s"):
                data = self._make_data(problem, rotate=True)
        room = self._room_bytes - data.nbytes
        while self._problems and sum(other.nbytes for other in self._problems.values()) > room:
            self._release(self._problems.pop(next(iter(self._problems))))
        self._problems[key] = data
        return data

    def _release_all(self) -> None:
        for data in (*self._awkward, *self._problems.values()):
            self._release(data)

    @contextlib.contextmanager
    def _clock(self, purpose: str) -> Iterator[None]:
        """Count the time inside towards ``purpose``, a field of :class:`TimeSpent`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - begin
            self._spent = replace(self._spent, **{purpose: getattr(self._spent, purpose) + elapsed_s})
