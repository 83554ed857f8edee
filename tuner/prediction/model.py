"""The analytic model of one launch: a roofline with the losses that tiles make. See docs/prediction.md.

Every function works on numbers and on arrays of one length alike, so that a whole space is predicted at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.tuner.prediction.constants import Constants

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Launches:
    """Launches side by side; arrays of one length."""

    programs: Values
    steps: Values
    step_flops: Values
    step_bytes: Values
    scalar_ops: Values
    dram_bytes: Values
    epilogue_bytes: Values
    feed: Values
    """1 / rows + 1 / columns of the tile; 0 where nothing is multiplied."""
    accumulators: Values
    num_warps: Values
    num_stages: Values
    blocks_per_sm: Values
    spill_bytes: Values
    """Per thread."""
    narrow: Values
    """1 where the arch's warp-group matrix instructions do not fit the tile."""

    @classmethod
    def stack(cls, rows: list[dict[str, float]]) -> Launches:
        """From one dictionary per launch."""
        return cls(**{name: np.array([row[name] for row in rows], np.float64) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Ceilings:
    """Of the device, for each launch or for all; in units per microsecond."""

    sm_count: Any
    flops_per_us: Any
    scalar_ops_per_us: Any
    dram_bytes_per_us: Any


def launch_terms(work: Launches, device: Ceilings, constants: Constants) -> dict[str, Values]:
    """Microseconds that each part of each launch would take alone, by name."""
    sm = device.sm_count
    held = sm * work.blocks_per_sm
    full = np.floor(work.programs / held)
    rest = work.programs - full * held
    waves = full + (rest > 0)
    l2_bytes_per_us = device.dram_bytes_per_us * constants.l2_ratio
    # Blocks that the busiest multiprocessor executes, one after the other or side by side.
    busiest = full * work.blocks_per_sm + np.ceil(rest / sm)
    beside = np.clip(np.ceil(work.programs / sm), 1, work.blocks_per_sm)

    share = constants.matrix_share / (1 + constants.feed * np.sqrt(work.num_warps / 4) * work.feed)
    share = share * np.where(work.narrow > 0, constants.narrow_share, 1.0)
    # Four schedulers need a warp each.
    share = share * np.minimum(1, beside * work.num_warps / 4)
    per_thread = work.accumulators / (32 * work.num_warps)
    share = share / (1 + constants.register_pressure * np.maximum(0, per_thread - 160) / 96)
    steps = busiest * work.steps
    spilled = work.spill_bytes * 32 * work.num_warps
    hidden = np.where(work.num_stages > 1, np.maximum(1, work.num_stages - 1), constants.first_stage)
    return {
        "launch": np.full_like(work.programs, constants.launch_us),
        "matrix": steps * work.step_flops / (device.flops_per_us / sm * share),
        "scalar": steps * work.scalar_ops / (device.scalar_ops_per_us / sm * constants.scalar_share),
        "dram": work.dram_bytes / (device.dram_bytes_per_us * constants.dram_share),
        "l2": work.programs * work.steps * (work.step_bytes + spilled) / l2_bytes_per_us,
        "latency": waves * work.steps * constants.step_us / hidden,
        "blocks": waves * constants.wave_us + work.programs * work.epilogue_bytes / l2_bytes_per_us,
    }


def launch_us(terms: dict[str, Values], constants: Constants) -> Values:
    """Time of each launch: what overlaps is joined by a norm, what does not is added."""
    overlapping = np.stack([terms[name] for name in ("matrix", "scalar", "dram", "l2", "latency")])
    longest = np.maximum(overlapping.max(axis=0), 1e-12)
    joined = longest * ((overlapping / longest) ** constants.overlap).sum(axis=0) ** (1 / constants.overlap)
    return np.asarray(terms["launch"] + terms["blocks"] + joined)
