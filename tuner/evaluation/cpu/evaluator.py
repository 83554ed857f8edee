"""The evaluator of the CPU target: checks kernels, then races those that are right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.precisions import LOSSLESS, WORD_BITS, find_precision
from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.resolve import Place
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.host_so import host_layout, require_host
from tilewright.tuner.evaluation.checking import PrecisionError, compare_precisions
from tilewright.tuner.evaluation.contest import Contest
from tilewright.tuner.evaluation.cpu.kernel_race import KernelTrack
from tilewright.tuner.evaluation.cpu.kernel_runner import KernelRunner, Mode
from tilewright.tuner.evaluation.cpu.mapping import ALIGNMENT
from tilewright.tuner.evaluation.cpu.session import Session
from tilewright.tuner.evaluation.cpu.shared_memory import huge_pages
from tilewright.tuner.evaluation.cpu.weights import WeightStore, declared_bytes
from tilewright.tuner.evaluation.faults import KernelFaultError, failed
from tilewright.tuner.evaluation.measuring import MeasuringEvaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.evaluation.problems import ProblemData, expected_bytes, share_inputs
from tilewright.tuner.evaluation.racing import RaceRules
from tilewright.tuner.evaluation.rotation import input_sets, weight_copies
from tilewright.tuner.evaluation.tensors import refusal
from tilewright.tuning_db.records import Outcome

_MEMORY_SHARE = 0.6
"""Of this machine's memory that weights and inputs may take together."""
_PROBLEM_SHARE = 0.1
"""Of memory for problems that are kept for when they are asked for again."""


class CpuEvaluator(MeasuringEvaluator[ProblemData]):
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
        cpu = read_cpu_info()
        super().__init__(op, signature, seed=seed, room_bytes=_PROBLEM_SHARE * cpu.memory_bytes)
        self._deployed = Mode(threads)
        self._checks = (Mode(1), self._deployed, Mode(threads, fork=False))
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

    def close(self) -> None:
        """End the worker and free all memory."""
        self._kernel_runner.close()
        self._release_all()

    @property
    def worker_pid(self) -> int | None:
        """Process that runs the kernels; None when there is none at the moment."""
        return self._session.worker_pid

    def precision_error(self, problem: Problem, precision: str) -> PrecisionError:
        """What ``precision`` does to the op's output on this problem, with inputs rounded where it rounds them, too.

        Raises:
            TilewrightError: when the problem does not fit the memory.

        """
        data = self._data(problem)
        return compare_precisions(self._reference(data, precision), self._reference(data, LOSSLESS))

    def _release(self, data: ProblemData) -> None:
        self._session.release(data.regions)

    def _groups(self, kernels: Sequence[BuiltKernel]) -> list[list[int]]:
        return self._kernel_runner.weights.groups([host_layout(kernel.recipe) for kernel in kernels])

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
            track = KernelTrack(self._kernel_runner, kernels, data, self._deployed)
            contest = Contest(track, [kernel.key for kernel in kernels], self._order)
            evaluations = contest.run(checked, budget_s=budget_s, rules=rules)
        self._session.forget_programs()
        return evaluations

    def _obstacle(self, kernel: BuiltKernel) -> str | None:
        try:
            require_host(kernel.recipe)
        except KernelRefused as error:
            return str(error)
        return None

    def _refusal(self, kernel: BuiltKernel, data: ProblemData) -> str | None:
        return _refusal(kernel, data, self._deployed.threads)

    def _check_on(self, kernel: BuiltKernel, data: ProblemData, *, awkward: bool) -> Evaluation:
        where = f"{kernel.recipe.size_name}={data.problem.size}"
        errors = []
        for mode in self._checks if awkward else (self._deployed,):
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

    def _prepare_reference(self, data: ProblemData, precision: str) -> None:
        self._reference(data, precision)

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


def _refusal(kernel: BuiltKernel, data: ProblemData, threads: int) -> str | None:
    """Why a guard of ``kernel`` refuses the problem; None when none does."""
    place = Place(threads=threads)
    return next((why for inputs in data.sets if (why := refusal(kernel.recipe, inputs.sizes, place, ALIGNMENT))), None)
