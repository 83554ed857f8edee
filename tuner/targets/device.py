"""A GPU that is there as a target: kernels are compiled here, and measured on it while others are compiled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

from tilewright.codegen.hardware.archs import GPU_ARCHS, Arch, GpuArch
from tilewright.codegen.hardware.devices import describe_device, find_device
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.space import Space
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.cuda.driver import DRIVER_VARIABLE, find_driver
from tilewright.runtime.launchers.cuda.present import PresentDevice, present_devices
from tilewright.tuner.campaign.campaign import Report, Request
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.commands.measured_findings import MeasuredFindings
from tilewright.tuner.evaluation.device.evaluator import DeviceEvaluator
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.search import Prior
from tilewright.tuner.targets.base import COMPILING, DefaultBudget, Shown, Target, Wishes
from tilewright.tuner.targets.gpu import ModelPriors, facts_of
from tilewright.tuning_db.records import DeviceRecord, Timing


class DeviceTarget(Target):
    """One CUDA device of this machine.

    In the database it is the product that its driver says it is, so that plans that were predicted for that product
    stand beside those that are measured; a device that is no product we know has a key made of what its driver calls
    it, and is never taken for one.
    """

    budget: ClassVar[DefaultBudget] = COMPILING
    finals: ClassVar[str] = "finalists race again on the device"
    timing: ClassVar[Timing] = "measured"
    compiles_beside: ClassVar[bool] = True

    def __init__(self, arch: GpuArch, present: PresentDevice) -> None:
        self.present = present
        described = describe_device(present.facts)
        facts = {**facts_of(described), "driver_name": present.facts.name}
        super().__init__(arch, DeviceRecord(described.key, present.facts.name, arch.name, facts), threads=0)
        self._priors = ModelPriors(described)

    @classmethod
    def find(cls, arch: Arch, wishes: Wishes, warn: Callable[[str], None]) -> Self | None:
        """The first device of ``arch`` that this process sees and that is meant."""
        del warn
        if wishes.predict or wishes.threads is not None:
            return None
        gpu = GPU_ARCHS[arch.name]
        meant = next((each for each in devices_here() if runs(each, gpu) and _is_meant(each, wishes, gpu)), None)
        return None if meant is None else cls(gpu, meant)

    def evaluator(
        self, op: OpDeclaration[Any, Any], signature: Signature, precisions: Sequence[str], seed: int
    ) -> Evaluator:
        """Measures, in a worker process with a context of its own."""
        arch = GPU_ARCHS[self.arch.name]
        return DeviceEvaluator(op, signature, self.present, arch, precisions=precisions, seed=seed)

    def priors(self, op: OpDeclaration[Any, Any], problem: Problem, space: Space) -> Iterator[Prior]:
        """The model's opinion of every config, where it has one of all templates."""
        if all(template.work is not None for template in op.templates_on(self.arch)):
            yield from self._priors.of(op, problem, space)

    def begin(self, progress: Progress) -> None:
        """Say what is measured on."""
        progress.say(f"measuring on {self.present.facts.name} ({self.arch.name}); --predict times nothing")

    def findings(
        self, runs: Sequence[tuple[Request, Report]], model: ModelShape | None, database: str
    ) -> Sequence[Shown]:
        """Times with their intervals, a table for every signature."""
        del model
        return [MeasuredFindings(report, request, database) for request, report in runs]


def devices_here() -> list[PresentDevice]:
    """All CUDA devices that this process sees; none where there is no driver.

    Raises:
        TilewrightError: when the driver that the environment names cannot be used.

    """
    try:
        return present_devices(find_driver())
    except TilewrightError:
        if DRIVER_VARIABLE in os.environ:
            raise
        return []


def runs(device: PresentDevice, arch: GpuArch) -> bool:
    """Whether ``device`` is of ``arch``."""
    return arch.triton_target[1] == device.sm


def _is_meant(device: PresentDevice, wishes: Wishes, arch: GpuArch) -> bool:
    if wishes.device is None or wishes.device == device.facts.name:
        return True
    key = describe_device(device.facts).key
    return wishes.device == key or find_device(wishes.device, arch).key == key
