"""A whole space predicted at once, before anything is built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tilewright.codegen.hardware.devices import Device
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.space import Config
from tilewright.tuner.prediction.fitted import FITTED
from tilewright.tuner.prediction.model import Launches, Values, launch_terms, launch_us
from tilewright.tuner.prediction.predict import ceilings, launch_row
from tilewright.tuner.prediction.resources import Resources


def predict_configs(op: OpDeclaration[Any, Any], problem: Problem, configs: Iterable[Config], device: Device) -> Values:
    """Microseconds of every config, float64 [configs], with resources as its tile lets expect.

    The same numbers as :func:`predict_config` without facts gives one by one.

    Raises:
        TilewrightError: when the device has no matrix unit for an operand's type.

    """
    signature, arch = problem.signature, device.arch
    rows: dict[str, list[dict[str, float]]] = {}
    owners: dict[str, list[int]] = {}
    count = 0
    for index, config in enumerate(configs):
        template = op.template(config)
        assert template.work is not None
        assert template.entries is not None
        specs = {entry.entry: entry for entry in template.entries(signature, config, arch)}
        for work in template.work(signature, config, arch, problem):
            spec = specs[work.entry]
            resources = Resources.estimated(work, arch, spec.num_warps, spec.num_stages)
            rows.setdefault(work.mma_dtype, []).append(launch_row(work, resources, device))
            owners.setdefault(work.mma_dtype, []).append(index)
        count = index + 1
    total = np.zeros(count)
    for dtype, launches in rows.items():
        times = launch_us(launch_terms(Launches.stack(launches), ceilings(device, dtype), FITTED), FITTED)
        np.add.at(total, owners[dtype], times)
    return total
