"""What a campaign tunes for: a device, what builds for it, and what evaluates for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tilewright.codegen.backends.base import Builder
from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.hardware.archs import Arch, CpuArch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.hardware.devices import Device
from tilewright.codegen.ops.base import OpDeclaration, Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.space import Config, Space
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.predicted.evaluator import PredictingEvaluator
from tilewright.tuner.prediction.space import predict_configs
from tilewright.tuner.search import Prior
from tilewright.tuning_db.records import DeviceRecord


class Target(Protocol):
    """One device. Close it when all is tuned."""

    @property
    def arch(self) -> Arch:
        """That kernels are built for."""

    @property
    def device(self) -> DeviceRecord:
        """As the database keeps it."""

    @property
    def threads(self) -> int:
        """That kernels run on; 0 where that is no choice of the caller's."""

    @property
    def builder(self) -> Builder:
        """For its arch."""

    @property
    def finals(self) -> str:
        """What the last step does, in words."""

    def evaluator(
        self, op: OpDeclaration[Any, Any], signature: Signature, precisions: Sequence[str], seed: int
    ) -> Evaluator:
        """Evaluator for kernels of ``signature`` in ``precisions``."""

    def priors(self, op: OpDeclaration[Any, Any], problem: Problem, space: Space) -> Iterator[Prior]:
        """What is known of ``space`` before anything is built."""

    def close(self) -> None:
        """End what it started."""


class CpuTarget:
    """The CPU of this machine: kernels are measured.

    Raises:
        TilewrightError: when there is no compiler.

    """

    finals = "finalists race again"

    def __init__(self, arch: CpuArch, threads: int) -> None:
        cpu = read_cpu_info()
        self.arch = arch
        self.threads = threads
        self.builder: Builder = CppBuilder(arch)
        facts = {
            "l1d_bytes": cpu.l1d_bytes,
            "l2_bytes": cpu.l2_bytes,
            "l3_bytes": cpu.l3_bytes,
            "memory_bytes": cpu.memory_bytes,
            "features": sorted(cpu.features),
        }
        self.device = DeviceRecord(cpu.key, cpu.name, arch.name, facts)

    def evaluator(
        self, op: OpDeclaration[Any, Any], signature: Signature, precisions: Sequence[str], seed: int
    ) -> Evaluator:
        """Measures, in a worker process."""
        return CpuEvaluator(op, signature, threads=self.threads, precisions=precisions, seed=seed)

    def priors(self, op: OpDeclaration[Any, Any], problem: Problem, space: Space) -> Iterator[Prior]:
        """Nothing is known of a CPU before it measured."""
        del op, problem, space
        yield from ()

    def close(self) -> None:
        """Nothing was started."""


class GpuTarget:
    """A GPU that need not be there: kernels are compiled for it, and their times predicted.

    Raises:
        TilewrightError: when Triton or its assembler is missing or too old.

    """

    threads = 0
    finals = "finalists run in the interpreter, and are compared at all sizes"

    def __init__(self, device: Device) -> None:
        arch = device.arch
        self._gpu = device
        self._predicted: dict[str, dict[Config, float]] = {}
        """Microseconds by problem and config: a problem is searched more than once."""
        self.arch = arch
        self._builder = TritonBuilder(arch)
        self.builder: Builder = self._builder
        facts = {
            "sm_count": device.sm_count,
            "boost_clock_mhz": device.boost_clock_mhz,
            "memory_bytes": device.memory_bytes,
            "bandwidth_gbps": device.bandwidth_gbps,
            "l2_bytes": device.l2_bytes,
            "peak_tflops": dict(device.peak_tflops),
        }
        self.device = DeviceRecord(device.key, device.name, arch.name, facts)

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
        yield Prior(f"model of {self._gpu.name}", tuple((config, known[config]) for config in space))

    def close(self) -> None:
        """End the compile server."""
        self._builder.close()
