"""From the work of launches to microseconds, with an interval and named terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.codegen.hardware.devices import Device
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.space import Config
from tilewright.codegen.work import LaunchWork
from tilewright.errors import TilewrightError
from tilewright.tuner.prediction.fitted import FACTOR_HIGH, FACTOR_LOW, FITTED
from tilewright.tuner.prediction.model import Ceilings, Launches, launch_terms, launch_us
from tilewright.tuner.prediction.resources import BinaryFacts, Resources

_FEWEST_ROWS = 64
_WARP_GROUP = 4


@dataclass(frozen=True)
class Prediction:
    """Time of a kernel that nobody measured."""

    us: float
    low_us: float
    """The measured time of nine out of ten kernels was between this and :attr:`high_us`, on problems, configs and
    devices that the model had not seen; of dense GEMM, which is what there is data of."""
    high_us: float
    terms: Mapping[str, float]
    """Microseconds that each part would take alone. ``launch`` and ``blocks`` add up; the others overlap."""


def ceilings(device: Device, dtype: str) -> Ceilings:
    """What ``device`` can do at the most.

    Raises:
        TilewrightError: when its matrix units know no such type.

    """
    if dtype not in device.peak_tflops:
        known = ", ".join(device.peak_tflops)
        raise TilewrightError(f"{device.name} has no matrix unit for {dtype}; its peaks are known for {known}")
    return Ceilings(
        sm_count=float(device.sm_count),
        flops_per_us=device.peak_tflops[dtype] * 1e6,
        scalar_ops_per_us=device.peak_tflops["fp32"] * 1e6,
        dram_bytes_per_us=device.bandwidth_gbps * 1e3,
    )


def launch_row(work: LaunchWork, resources: Resources, device: Device) -> dict[str, float]:
    """One launch as a row of :class:`Launches`."""
    arch = device.arch
    rows, columns = work.tile
    groups = not {"wgmma", "tcgen05"}.isdisjoint(arch.capabilities)
    warps = resources.computing_warps or resources.num_warps
    narrow = groups and rows > 0 and (rows < _FEWEST_ROWS or warps < _WARP_GROUP)
    blocks, rounds, share = float(work.programs), 1.0, 1.0
    if work.resident and work.programs:
        blocks = min(blocks, float(work.resident * device.sm_count))
        rounds = math.ceil(work.programs / blocks)
        share = work.programs / (blocks * rounds)  # of what the busiest block does, on average
    return {
        "programs": blocks,
        "steps": work.steps * rounds,
        "step_flops": work.step_flops,
        "step_bytes": work.step_bytes * share,
        "scalar_ops": work.scalar_ops,
        "dram_bytes": work.dram_bytes,
        "epilogue_bytes": work.epilogue_bytes * rounds * share,
        "feed": 1 / rows + 1 / columns if work.accumulators else 0.0,
        "accumulators": float(work.accumulators),
        "num_warps": float(warps * arch.warp_size / 32),
        "num_stages": float(resources.num_stages),
        "blocks_per_sm": float(min(8, max(1, resources.blocks_per_sm(arch)))),
        "spill_bytes": float(resources.spill_bytes),
        "narrow": float(narrow),
    }


def predict(work: Sequence[LaunchWork], resources: Sequence[Resources], device: Device) -> Prediction:
    """Time of a kernel: its launches one after the other.

    Args:
        work: of each launch.
        resources: of each launch, read from its binary or estimated.
        device: that it would run on.

    Raises:
        TilewrightError: when the device has no matrix unit for an operand's type.

    """
    total, sums = 0.0, dict.fromkeys(_TERMS, 0.0)
    for each, taken in zip(work, resources, strict=True):
        launches = Launches.stack([launch_row(each, taken, device)])
        terms = launch_terms(launches, ceilings(device, each.mma_dtype), FITTED)
        total += float(launch_us(terms, FITTED)[0])
        for name, values in terms.items():
            sums[name] += float(np.asarray(values)[0])
    return Prediction(total, total * FACTOR_LOW, total * FACTOR_HIGH, sums)


_TERMS = ("launch", "matrix", "scalar", "dram", "l2", "latency", "blocks")


def predict_config(
    template: Template[Any],
    signature: Signature,
    problem: Problem,
    config: Config,
    device: Device,
    facts: Sequence[BinaryFacts] | None = None,
) -> Prediction:
    """Time of one config; ``facts`` of its entries where they are built, else its resources are estimated.

    Raises:
        TilewrightError: when the template supplies no work to predict from, or the device lacks a type.

    """
    if template.work is None or template.entries is None:
        raise TilewrightError(f"template {template.name} is only measured; it does not say what its launches do")
    work = template.work(signature, config, device.arch, problem)
    entries = {entry.entry: entry for entry in template.entries(signature, config, device.arch)}
    specs = [entries[each.entry] for each in work]
    if facts is None:
        resources = [
            Resources.estimated(each, device.arch, spec.num_warps, spec.num_stages)
            for each, spec in zip(work, specs, strict=True)
        ]
    else:
        by_entry = {found.entry: found for found in facts}
        resources = [Resources.of_binary(by_entry[spec.entry], spec.num_stages, spec.num_warps) for spec in specs]
    return predict(work, resources, device)
