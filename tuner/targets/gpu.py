"""What targets of GPUs have in common, whether the device is there or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewright.codegen.hardware.devices import Device
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.space import Config, Space
from tilewright.tuner.prediction.space import predict_configs
from tilewright.tuner.search import Prior


def facts_of(device: Device) -> dict[str, Any]:
    """What the database keeps of a device."""
    return {
        "sm_count": device.sm_count,
        "boost_clock_mhz": device.boost_clock_mhz,
        "memory_bytes": device.memory_bytes,
        "bandwidth_gbps": device.bandwidth_gbps,
        "l2_bytes": device.l2_bytes,
        "peak_tflops": dict(device.peak_tflops),
    }


class ModelPriors:
    """What the model of GPUs says of every config, from its tile alone."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._predicted: dict[str, dict[Config, float]] = {}
        """Microseconds by problem and config: a problem is searched more than once."""

    def of(self, op: OpDeclaration[Any, Any], problem: Problem, space: Space) -> Iterator[Prior]:
        """Its opinion of every config of ``space``."""
        known = self._predicted.setdefault(problem.key, {})
        new = [config for config in space if config not in known]
        known.update(zip(new, predict_configs(op, problem, new, self._device).tolist(), strict=True))
        yield Prior(f"model of {self._device.name}", tuple((config, known[config]) for config in space), "predicted")
