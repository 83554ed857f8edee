"""The evaluator of a GPU that is there: checks kernels on it, then races those that are right."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.numbers.precisions import LOSSLESS, find_precision
from tilewright.codegen.ops.base import Arrays, OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.resolve import Place
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.cuda.present import PresentDevice
from tilewright.tuner.evaluation.checking import PrecisionError
from tilewright.tuner.evaluation.contest import Contest
from tilewright.tuner.evaluation.device.conditions import Monitor
from tilewright.tuner.evaluation.device.kernel_race import DeviceTrack
from tilewright.tuner.evaluation.device.kernel_runner import DeviceRunner
from tilewright.tuner.evaluation.device.nvml import Nvml
from tilewright.tuner.evaluation.device.problems import DeviceProblem, expected_bytes, place_inputs
from tilewright.tuner.evaluation.device.session import DeviceSession
from tilewright.tuner.evaluation.device.weights import DeviceWeights, declared_elements
from tilewright.tuner.evaluation.emulated.checking import gpu_precision_error
from tilewright.tuner.evaluation.faults import KernelFaultError, failed
from tilewright.tuner.evaluation.measuring import MeasuringEvaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.evaluation.racing import RaceRules
from tilewright.tuner.evaluation.rotation import input_sets, weight_copies
from tilewright.tuning_db.records import Outcome

_HOST_SHARE = 0.6
"""Of this machine's memory that weights, inputs and references may take together."""
_DEVICE_SHARE = 0.9
"""Of the device's free memory that may be used."""
_PROBLEM_SHARE = 0.1
"""Of this machine's memory for problems that are kept for when they are asked for again."""
_CACHES = 2
"""The memory that is filled before what is timed is so many times the L2 cache."""
_MOST_REPEATS = 2
"""Of a race during which the device was slowed down."""


class DeviceEvaluator(MeasuringEvaluator[DeviceProblem]):
    """Checks and measures kernels of one signature on a GPU, in a worker process.

    Weights are made when it is created and inputs when a problem is first seen, all from ``seed``. A kernel is checked
    against the fp64 reference, its outputs poisoned before, with guards around every buffer. Not thread-safe.

    Args:
        op: the op.
        signature: of all kernels and problems.
        device: that is measured on; nothing else should use it.
        arch: of the device.
        precisions: of the weights of all kernels; the fewer the bits, the more data a race rotates.
        seed: of all data and of the order of races.
        time_limit_s: for one call of a kernel.

    Raises:
        TilewrightError: when the weights do not fit the memory of this machine or the device, or the device cannot be
            opened.

    """

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        signature: Signature,
        device: PresentDevice,
        arch: GpuArch,
        *,
        precisions: Sequence[str] = (LOSSLESS,),
        seed: int = 0,
        time_limit_s: float = 10.0,
    ) -> None:
        self._host_bytes = read_cpu_info().memory_bytes
        super().__init__(op, signature, seed=seed, room_bytes=_PROBLEM_SHARE * self._host_bytes)
        self._device = device
        self._cache_bytes = device.facts.l2_bytes
        self._monitor = Monitor(Nvml.find(device.uuid))
        tensors = op.tensors(signature)
        elements = declared_elements(tensors)
        # Floats as references read them, and the same once more as the device does.
        self._refuse_if_too_large(
            "weights", 2 * ITEMSIZE[LOSSLESS] * elements, ITEMSIZE[op.lossless(signature)] * elements
        )
        declared = find_precision(op.lossless(signature)).bits
        bits = [declared if name == LOSSLESS else find_precision(name).bits for name in precisions]
        self._stored_share = min(bits) / declared
        with contextlib.ExitStack() as undo:
            session = DeviceSession(
                device_index=device.index, scratch_bytes=_CACHES * self._cache_bytes, time_limit_s=time_limit_s
            )
            undo.callback(session.close)
            self._session = session
            with self._clock("preparing_s"):
                weights = DeviceWeights(
                    tensors,
                    op.weights(signature, seed),
                    copies=partial(weight_copies, cache_bytes=self._cache_bytes),
                    capacity_bytes=int(_DEVICE_SHARE / 2 * session.free_bytes),
                    release=session.release,
                )
                place = Place(sm_count=device.facts.sm_count)
                self._runner = DeviceRunner(op, arch, session, weights, place, op.tolerance(signature))
                self._awkward = tuple(self._make_data(each, rotate=False) for each in op.awkward_problems(signature))
            undo.pop_all()

    def close(self) -> None:
        """End the worker and free all memory."""
        self._runner.close()

    @property
    def worker_pid(self) -> int | None:
        """Process that runs the kernels; None when there is none at the moment."""
        return self._session.worker_pid

    def precision_error(self, problem: Problem, precision: str) -> PrecisionError:
        """What ``precision`` does to the output, on a part of ``problem`` that has its whole reduction."""
        with self._clock("preparing_s"):
            return gpu_precision_error(self._op, self._op.sample(problem), precision, self._seed)

    def _make_data(self, problem: Problem, *, rotate: bool) -> DeviceProblem:
        what = f"{problem.size} {problem.signature.size_name}"
        first = self._op.inputs(problem, self._seed)
        self._refuse_if_too_large(what, *expected_bytes(self._op, problem, first))
        touched = self._stored_share * self._op.workload(problem, first).min_bytes
        sets = input_sets(touched, self._cache_bytes) if rotate else 1
        others = (self._op.inputs(problem, self._seed + index) for index in range(1, sets))
        placed = (place_inputs(self._op, problem, first), *(place_inputs(self._op, problem, each) for each in others))
        return DeviceProblem(problem, placed, first, {})

    def _release(self, data: DeviceProblem) -> None:
        self._session.release(data.buffers)

    def _obstacle(self, kernel: BuiltKernel) -> str | None:
        try:
            self._runner.recipe(kernel)
        except KernelRefused as error:
            return str(error)
        return None

    def _refusal(self, kernel: BuiltKernel, data: DeviceProblem) -> str | None:
        return self._runner.refusal(kernel, data)

    def _prepare_reference(self, data: DeviceProblem, precision: str) -> None:
        if precision in data.references:
            return
        with self._clock("preparing_s"):
            weights: Arrays = self._runner.weights.rounded(precision)
            inputs = data.inputs
            if precision != LOSSLESS:
                inputs = self._op.rounded_inputs(self._signature, inputs, precision)
            data.references[precision] = self._op.reference(self._signature, weights, inputs)

    def _check_on(self, kernel: BuiltKernel, data: DeviceProblem, *, awkward: bool) -> Evaluation:
        del awkward
        with self._clock("preparing_s"):
            self._runner.reserve([kernel], data)
        with self._clock("checking_s"):
            try:
                error = self._runner.checked_run(kernel, data)
            except KernelFaultError as fault:
                return failed(kernel.key, fault, f"{kernel.recipe.size_name}={data.problem.size}")
            finally:
                self._session.forget_programs()
        return Evaluation(kernel.key, Outcome.OK, error=error)

    def _groups(self, kernels: Sequence[BuiltKernel]) -> list[list[int]]:
        return self._runner.groups(kernels)

    def _race(
        self,
        kernels: Sequence[BuiltKernel],
        checked: Sequence[Evaluation],
        data: DeviceProblem,
        *,
        budget_s: float,
        rules: RaceRules,
    ) -> list[Evaluation]:
        with self._clock("preparing_s"):
            self._runner.reserve(kernels, data)
        with self._clock("measuring_s"):
            for repeats in range(_MOST_REPEATS + 1):
                self._monitor.begin()
                track = DeviceTrack(self._runner, kernels, data, self._monitor)
                contest = Contest(track, [kernel.key for kernel in kernels], self._order)
                raced = contest.run(checked, budget_s=budget_s, rules=rules)
                if not self._monitor.slowed_down or repeats == _MOST_REPEATS:
                    break
                self._monitor.cool_down()
        self._session.forget_programs()
        conditions = self._monitor.conditions(self._session.method, self._session.driver_version, repeats).to_dict()
        return [replace(each, conditions=conditions) if each.samples_us else each for each in raced]

    def _refuse_if_too_large(self, what: str, host_bytes: int, device_bytes: int) -> None:
        places = (
            ("this machine", host_bytes, self._host_bytes, _HOST_SHARE),
            (self._device.facts.name, device_bytes, self._device.facts.memory_bytes, _DEVICE_SHARE),
        )
        for place, needed, there, share in places:
            if needed > share * there:
                raise TilewrightError(
                    f"{self._signature.describe()} is too large for {place}: {what} take {needed / 1e9:.1f} GB of "
                    f"{there / 1e9:.1f} GB, and at most {share:.0%} may be used; raise --tp or --ep, or tune on a "
                    "machine with more memory"
                )
