"""The evaluator of the CPU target: checks kernels, then races those that are right."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.precisions import LOSSLESS, WORD_BITS, find_precision
from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.host_so import host_layout, require_host
from tilewright.tuner.evaluation.checking import PrecisionError, compare_precisions
from tilewright.tuner.evaluation.cpu.binding import refusal
from tilewright.tuner.evaluation.cpu.kernel_race import KernelRace
from tilewright.tuner.evaluation.cpu.kernel_runner import KernelRunner, Mode, failed
from tilewright.tuner.evaluation.cpu.session import KernelFaultError, Session
from tilewright.tuner.evaluation.cpu.shared_memory import huge_pages
from tilewright.tuner.evaluation.cpu.weights import WeightStore, declared_bytes
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation, TimeSpent
from tilewright.tuner.evaluation.problems import ProblemData, expected_bytes, share_inputs
from tilewright.tuner.evaluation.racing import RaceRules
from tilewright.tuner.evaluation.rotation import input_sets, weight_copies
from tilewright.tuner.evaluation.statistics import MIN_SAMPLES, Ratio, paired_ratio
from tilewright.tuning_db.records import Checked, Outcome

_MEMORY_SHARE = 0.6
"""Of this machine's memory that weights and inputs may take together."""
_PROBLEM_SHARE = 0.1
"""Of memory for problems that are kept for when they are asked for again."""
_FINAL_RULES = RaceRules(least_samples=MIN_SAMPLES, overtime=1.0)
"""Of races that decide, and whose medians are shown."""


class CpuEvaluator:
    """Checks and measures kernels of one signature on this machine's CPU, in a worker process.

    Weights are made when it is created and inputs when a problem is first seen, all from ``seed``. Not thread-safe: use
    it from the thread that created it, and on a machine that has nothing else to do.

    Args:
        op: the op.
        signature: of all kernels and problems.
        threads: that kernels are measured with; they are checked with one, too.
        precisions: of the weights of all kernels; the fewer the bits, the more data a race rotates.
        seed: of all data and of the order of races.
        time_limit_s: for one call of a kernel.
        memory_limit_bytes: that a kernel may allocate for itself.

    Raises:
        TilewrightError: when the weights take more than 60 % of the memory, or no worker can be started.

    """

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        signature: Signature,
        *,
        threads: int,
        precisions: Sequence[str] = (LOSSLESS,),
        seed: int = 0,
        time_limit_s: float = 10.0,
        memory_limit_bytes: int = 1 << 30,
    ) -> None:
        self._op = op
        self._signature = signature
        self._seed = seed
        self._order = random.Random(seed)
        self._deployed = Mode(threads)
        self._checks = (Mode(1), self._deployed, Mode(threads, fork=False))
        self._spent = TimeSpent()
        self._verdicts: dict[tuple[str, str], Evaluation] = {}
        self._problems: dict[str, ProblemData] = {}
        cpu = read_cpu_info()
        self._cache_bytes = cpu.own_cache_bytes
        self._memory_bytes = cpu.memory_bytes
        tensors = op.tensors(signature)
        weight_bytes = declared_bytes(tensors)
        self._refuse_if_too_large("weights and their packed copy", 2 * weight_bytes)
        self._stored_share = min(find_precision(name).bits for name in precisions) / WORD_BITS
        with contextlib.ExitStack() as undo:
            self._session = Session(threads=threads, time_limit_s=time_limit_s, memory_limit_bytes=memory_limit_bytes)
            undo.callback(self._session.close)
            with self._clock("preparing_s"):
                room = (_MEMORY_SHARE - _PROBLEM_SHARE) * self._memory_bytes - weight_bytes
                weights = WeightStore(
                    tensors,
                    op.weights(signature, seed),
                    copies=partial(weight_copies, cache_bytes=self._cache_bytes),
                    # Of what the worker copies to get huge pages, there are two.
                    capacity_bytes=int(room / (2 if huge_pages(advised=True) else 1)),
                    release=self._session.release,
                )
                self._kernel_runner = KernelRunner(self._session, weights, op.tolerance(signature))
                self._awkward = tuple(self._make_data(each, rotate=False) for each in op.awkward_problems(signature))
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and free all memory."""
        self._kernel_runner.close()
        for data in (*self._awkward, *self._problems.values()):
            self._session.release(data.regions)

    @property
    def spent(self) -> TimeSpent:
        """Wall seconds used so far."""
        return self._spent

    @property
    def worker_pid(self) -> int | None:
        """Process that runs the kernels; None when there is none at the moment."""
        return self._session.worker_pid

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
        for group in self._kernel_runner.weights.groups([host_layout(kernels[index].recipe) for index in racers]):
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

    def precision_error(self, problem: Problem, precision: str) -> PrecisionError:
        """What ``precision`` does to the op's output on this problem, with inputs rounded where it rounds them, too.

        Raises:
            TilewrightError: when the problem does not fit the memory.

        """
        data = self._data(problem)
        return compare_precisions(self._reference(data, precision), self._reference(data, LOSSLESS))

    def _race(
        self,
        kernels: Sequence[BuiltKernel],
        checked: Sequence[Evaluation],
        data: ProblemData,
        *,
        budget_s: float,
        rules: RaceRules,
    ) -> list[Evaluation]:
        with self._clock("preparing_s"):
            self._kernel_runner.reserve(kernels, data, self._deployed.threads)
        with self._clock("measuring_s"):
            kernel_race = KernelRace(self._kernel_runner, kernels, data, self._deployed, self._order)
            evaluations = kernel_race.run(checked, budget_s=budget_s, rules=rules)
        self._session.forget_programs()
        return evaluations

    def _check(self, kernel: BuiltKernel, data: ProblemData) -> Evaluation:
        """Whether ``kernel`` is right on the awkward problems and on this one; every problem once per kernel."""
        try:
            require_host(kernel.recipe)
        except KernelRefused as error:
            return Evaluation(kernel.key, Outcome.REJECTED, str(error))
        if refused := _refusal(kernel, data, self._deployed.threads):
            return Evaluation(kernel.key, Outcome.REJECTED, f"a guard refuses the problem: {refused}")
        evaluation = Evaluation(kernel.key, Outcome.OK)
        for each in (*self._awkward, data):
            self._reference(each, kernel.recipe.precision)
        for checked, modes in (*((awkward, self._checks) for awkward in self._awkward), (data, (self._deployed,))):
            if _refusal(kernel, checked, self._deployed.threads):
                continue  # The runtime falls back there.
            identity = (kernel.key, checked.problem.key)
            if identity not in self._verdicts:
                self._verdicts[identity] = self._check_on(kernel, checked, modes)
            evaluation = self._verdicts[identity]
            if evaluation.outcome is not Outcome.OK:
                break
        return evaluation

    def _check_on(self, kernel: BuiltKernel, data: ProblemData, modes: Sequence[Mode]) -> Evaluation:
        where = f"{kernel.recipe.size_name}={data.problem.size}"
        errors = []
        for mode in modes:
            if _refusal(kernel, data, mode.threads):
                continue
            with self._clock("preparing_s"):
                self._kernel_runner.reserve([kernel], data, mode.threads)
            with self._clock("checking_s"):
                try:
                    errors.append(self._kernel_runner.checked_run(kernel, data, mode))
                except KernelFaultError as fault:
                    return failed(kernel.key, fault, f"{where}, {mode}")
        return Evaluation(kernel.key, Outcome.OK, error=max(errors))

    def _data(self, problem: Problem) -> ProblemData:
        """Data of a problem to measure; what was used least recently makes room."""
        key = problem.key
        data = self._problems.pop(key, None)
        if data is None:
            with self._clock("preparing_s"):
                data = self._make_data(problem, rotate=True)
        room = _PROBLEM_SHARE * self._memory_bytes - data.nbytes
        while self._problems and sum(other.nbytes for other in self._problems.values()) > room:
            self._session.release(self._problems.pop(next(iter(self._problems))).regions)
        self._problems[key] = data
        return data

    def _make_data(self, problem: Problem, *, rotate: bool) -> ProblemData:
        """Inputs, outputs and reference; with ``rotate``, enough sets of them to exceed the cache."""
        what, weight_bytes = f"{problem.size} tokens", declared_bytes(self._op.tensors(self._signature))
        # Twice before anything is drawn: the inputs, and their copy that the worker shares.
        self._refuse_if_too_large(what, weight_bytes + 2 * self._op.input_bytes(problem))
        first = self._op.inputs(problem, self._seed)
        self._refuse_if_too_large(what, weight_bytes + expected_bytes(self._op, problem, first))
        touched = self._stored_share * self._op.workload(problem, first).min_bytes
        sets = input_sets(touched, self._cache_bytes) if rotate else 1
        others = (self._op.inputs(problem, self._seed + index) for index in range(1, sets))
        shared = tuple(share_inputs(self._op, problem, inputs) for inputs in itertools.chain((first,), others))
        return ProblemData(problem, shared, {})

    def _reference(self, data: ProblemData, precision: str) -> Arrays:
        """What must come out in ``precision``."""
        if precision not in data.references:
            with self._clock("preparing_s"):
                weights = self._kernel_runner.weights.rounded(precision)
                inputs = data.sets[0].inputs(self._op.tensors(self._signature))
                inputs = self._op.rounded_inputs(self._signature, inputs, precision)
                data.references[precision] = self._op.reference(self._signature, weights, inputs)
        return data.references[precision]

    def _refuse_if_too_large(self, what: str, needed_bytes: int) -> None:
        if needed_bytes > _MEMORY_SHARE * self._memory_bytes:
            raise TilewrightError(
                f"{self._signature.describe()} is too large for this machine: {what} take {needed_bytes / 1e9:.1f} GB "
                f"of {self._memory_bytes / 1e9:.1f} GB, and at most {_MEMORY_SHARE:.0%} may be used; "
                "raise --tp or --ep, or tune on a machine with more memory"
            )

    @contextlib.contextmanager
    def _clock(self, purpose: str) -> Iterator[None]:
        """Count the time inside towards ``purpose``, a field of :class:`TimeSpent`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - begin
            self._spent = replace(self._spent, **{purpose: getattr(self._spent, purpose) + elapsed_s})


def _refusal(kernel: BuiltKernel, data: ProblemData, threads: int) -> str | None:
    """Why a guard of ``kernel`` refuses the problem; None when none does."""
    return next((why for inputs in data.sets if (why := refusal(kernel.recipe, inputs.sizes, threads))), None)
