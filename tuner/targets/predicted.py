"""A GPU that need not be there as a target: kernels are compiled for it, and their times predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

from tilewright.codegen.hardware.archs import GPU_ARCHS, Arch
from tilewright.codegen.hardware.devices import Device, find_device
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.space import Config, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.campaign import Report, Request
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.commands.predicted_findings import PredictedFindings
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.predicted.evaluator import PredictingEvaluator
from tilewright.tuner.prediction.space import predict_configs
from tilewright.tuner.search import Prior
from tilewright.tuner.targets.base import COMPILING, DefaultBudget, Shown, Target, Wishes
from tilewright.tuning_db.records import DeviceRecord, Timing


class PredictedTarget(Target):
    """A product of a GPU arch, known by its data alone."""

    budget: ClassVar[DefaultBudget] = COMPILING
    finals: ClassVar[str] = "finalists run in the interpreter, and are compared at all sizes"
    timing: ClassVar[Timing] = "predicted"

    def __init__(self, device: Device) -> None:
        facts = {
            "sm_count": device.sm_count,
            "boost_clock_mhz": device.boost_clock_mhz,
            "memory_bytes": device.memory_bytes,
            "bandwidth_gbps": device.bandwidth_gbps,
            "l2_bytes": device.l2_bytes,
            "peak_tflops": dict(device.peak_tflops),
        }
        record = DeviceRecord(device.key, device.name, device.arch.name, facts)
        super().__init__(device.arch, record, threads=0)
        self._gpu = device
        self._predicted: dict[str, dict[Config, float]] = {}
        """Microseconds by problem and config: a problem is searched more than once."""

    @classmethod
    def find(cls, arch: Arch, wishes: Wishes, warn: Callable[[str], None]) -> Self | None:
        """The product that is named, or the arch's usual one."""
        if wishes.threads is not None:
            raise TilewrightError(f"--threads is of CPU kernels; leave it out for {arch.name}")
        del warn
        return cls(find_device(wishes.device, GPU_ARCHS[arch.name]))

    def evaluator(
        self, op: OpDeclaration[Any, Any], signature: Signature, precisions: Sequence[str], seed: int
    ) -> Evaluator:
        """Predicts from binaries, and checks finalists in the interpreter."""
        del precisions
        return PredictingEvaluator(op, signature, self._gpu, seed=seed)

    def priors(self, op: OpDeclaration[Any, Any], problem: Problem, space: Space) -> Iterator[Prior]:
        """The model's opinion of every config, from its tile alone."""
        known = self._predicted.setdefault(problem.key, {})
        new = [config for config in space if config not in known]
        known.update(zip(new, predict_configs(op, problem, new, self._gpu).tolist(), strict=True))
        yield Prior(f"model of {self._gpu.name}", tuple((config, known[config]) for config in space), "predicted")

    def lack(self, template: Template[Any]) -> str | None:
        """What predictions are made from."""
        return "does not say what predictions are made from" if template.work is None else None

    def begin(self, progress: Progress) -> None:
        """Say what the times will be worth."""
        progress.say(f"{self._gpu.name} ({self.arch.name}): nothing is timed on a GPU")

    def findings(
        self, runs: Sequence[tuple[Request, Report]], model: ModelShape | None, database: str
    ) -> Sequence[Shown]:
        """Predictions with their ranges, a table for every signature."""
        del model
        return [PredictedFindings(report, request, self._gpu, database) for request, report in runs]
