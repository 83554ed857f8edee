"""The evaluator of GPU targets without a GPU: times predicted from binaries, semantics checked by an interpreter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from tilewright.codegen.hardware.devices import Device
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.tuner.evaluation.checking import PrecisionError
from tilewright.tuner.evaluation.emulated.checking import EmulatedChecker, gpu_precision_error
from tilewright.tuner.evaluation.emulated.emulator import Emulator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation, TimeSpent
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.prediction.predict import Prediction, predict_config
from tilewright.tuning_db.records import Checked, Outcome

PREDICTION_NOISE = 0.05
"""By how much one kernel has to be predicted faster than another for that to mean anything: on problems and devices
that the model has not seen, its first choice is slower than the best by 4.8 to 7.5 % in the mean (docs/prediction.md).
"""


class PredictingEvaluator:
    """Predicts kernels of one signature for ``device``; finalists run in the interpreter, too.

    The time of a kernel is what the model makes of its binaries' facts: the same whenever it is asked, so that there is
    no noise. Not thread-safe.

    Args:
        op: the op.
        signature: of all kernels and problems.
        device: that times are predicted for.
        seed: of the data that precisions are judged on.

    """

    def __init__(self, op: OpDeclaration[Any, Any], signature: Signature, device: Device, *, seed: int = 0) -> None:
        self._op = op
        self._signature = signature
        self._device = device
        self._seed = seed
        self._spent = TimeSpent()
        self._right: set[str] = set()
        self._emulator = Emulator()
        self._checker = EmulatedChecker(op, device.arch, self._emulator)
        self._emulator.start()  # it loads while the first variants are compiled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._emulator.__exit__(kind, error, trace)

    @property
    def spent(self) -> TimeSpent:
        """Wall seconds used so far."""
        return self._spent

    def predict(self, kernel: BuiltKernel, problem: Problem) -> Prediction:
        """What the model makes of a kernel's binaries."""
        template = self._op.template(kernel.config)
        return predict_config(template, self._signature, problem, kernel.config, self._device, kernel.facts)

    def evaluate(
        self, kernels: Sequence[BuiltKernel], problem: Problem, *, budget_s: float, finalists: bool = False
    ) -> list[Evaluation]:
        """Predictions of ``kernels``, in order; of finalists those that are right in the interpreter.

        ``budget_s`` is not needed: a prediction takes no time, and a check as long as it takes.

        Raises:
            TilewrightError: when the device lacks a type that a kernel needs.

        """
        del budget_s
        evaluations = []
        for kernel in kernels:
            prediction = self.predict(kernel, problem)
            evaluation = Evaluation(
                kernel.key,
                Outcome.OK,
                median_us=prediction.us,
                low_us=prediction.low_us,
                high_us=prediction.high_us,
                timing="predicted",
                checked="compiled",
            )
            evaluations.append(self._emulated(kernel, evaluation) if finalists else evaluation)
        return evaluations

    def checked(self, kernel_key: str) -> Checked:
        """How far a built kernel was checked so far."""
        return "emulated" if kernel_key in self._right else "compiled"

    def measure_noise(self, kernel: BuiltKernel, problem: Problem, *, budget_s: float) -> Ratio:
        """A prediction is the same every time; what it does not tell apart is :data:`PREDICTION_NOISE`."""
        del kernel, problem, budget_s
        return Ratio(1.0, 1 - PREDICTION_NOISE, 1 + PREDICTION_NOISE, 0)

    def precision_error(self, problem: Problem, precision: str) -> PrecisionError:
        """What ``precision`` does to the output, on a part of ``problem`` that has its whole reduction."""
        begin = time.perf_counter()
        error = gpu_precision_error(self._op, self._op.sample(problem), precision, self._seed)
        self._spent = replace(self._spent, preparing_s=self._spent.preparing_s + time.perf_counter() - begin)
        return error

    def _emulated(self, kernel: BuiltKernel, evaluation: Evaluation) -> Evaluation:
        """``evaluation`` with what the interpreter says; as it is where the template cannot be interpreted."""
        if self._op.template(kernel.config).emulated_problems is None:
            return evaluation
        begin = time.perf_counter()
        check = self._checker.check(self._signature, kernel.config)
        self._spent = replace(self._spent, checking_s=self._spent.checking_s + time.perf_counter() - begin)
        if check.complaint:
            return Evaluation(kernel.key, Outcome.WRONG, f"in the interpreter: {check.complaint}", error=check.error)
        self._right.add(kernel.key)
        return replace(evaluation, error=check.error, checked="emulated")
