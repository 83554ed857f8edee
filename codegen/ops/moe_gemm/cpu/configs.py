"""moe_gemm on CPUs: the config that needs no search, and those that a search begins with."""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.codegen.hardware.archs import CpuArch
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.implementation import Choice, Implementation
from tilewright.codegen.ops.moe_gemm.cpu.templates import BLOCKED, INTEGER, STREAM, TEMPLATES, groups_of
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.space import Config, Space, Value


def default_config(signature: MoeGemmSignature, arch: CpuArch, size: int | None = None) -> Choice:  # noqa: ARG001
    """Six rows by two vectors (twelve accumulators), packed x, k in blocks that keep a panel in the first cache."""
    panels = groups_of(signature, 2, arch)
    own: dict[str, Value] = {
        "precision": LOSSLESS,
        "vectors": 2,
        "block_rows": 6,
        "streams": 1,
        "k_block": min(256, signature.k),
        "block_m": 96,
        "chunk_groups": max(groups for groups in (1, 2, 4) if groups <= max(panels, 1)),
        "order": "panel_outer",
        "pack_x": True,
        "unroll": 4,
        "prefetch": 0,
        "fetch_next": False,
        "schedule": "dynamic",
        "gate_up": "interleaved" if signature.halves == 2 else "none",
        "combine": "partials" if signature.stage == "down" else "none",
    }
    return BLOCKED, own


def starting_configs(signature: MoeGemmSignature, arch: CpuArch, precisions: Sequence[str]) -> tuple[Config, ...]:
    """What won on machines that were tuned: narrow panels side by side for few rows; for many, next panels fetched.

    Of every precision, one for few rows and one for many, in one weight layout.
    """
    halves, whole = signature.halves, _whole_space(signature, arch)
    # Vectors of one panel, of which half are gates where gate and up lie apart, so that columns are as few.
    narrow: dict[str, Value] = {"vectors": 1, "gate_up": "none"}
    wide: dict[str, Value] = {"vectors": 2, "gate_up": "none"}
    if halves == 2:
        narrow, wide = {"vectors": 2, "gate_up": "apart"}, {"vectors": 2, "gate_up": "interleaved"}

    def tile(template: str, rows: int, streams: int, panel: dict[str, Value], precision: str) -> Config | None:
        knobs: dict[str, Value] = {
            **panel,
            "precision": precision,
            "block_rows": rows,
            "streams": streams // halves if panel is narrow else streams,
            "chunk_groups": max(groups for groups in (1, 2, 4) if groups <= max(groups_of(signature, 2, arch), 1)),
            "unroll": 1,
            "prefetch": 0,
            "schedule": "dynamic",
            "combine": "partials" if signature.stage == "down" else "none",
        }
        if template != STREAM:
            exact = template == BLOCKED and precision == LOSSLESS
            knobs |= {"block_m": 96, "pack_x": template == INTEGER, "fetch_next": exact}
        if template == BLOCKED:
            knobs |= {"k_block": signature.k, "order": "panel_outer"}
        own = next(each for each in TEMPLATES if each.name == template)
        known = tuple(name for name in precisions if name in own.precisions)
        if precision not in known or own.space(signature, arch, known).find(knobs) is None:
            return None
        return whole.lift(template, knobs)

    starts = (
        *(tile(STREAM, 2, 8, narrow, name) for name in precisions),
        *(tile(INTEGER, 1, 6, narrow, name) for name in precisions),
        tile(STREAM, 4, 4, narrow, LOSSLESS),
        *(tile(BLOCKED, 6, 2, narrow, name) for name in precisions),
        *(tile(INTEGER, 6, 2, narrow, name) for name in precisions),
        tile(BLOCKED, 6, 1, wide, LOSSLESS),
    )
    return tuple(config for config in starts if config is not None)


def _whole_space(signature: MoeGemmSignature, arch: CpuArch) -> Space:
    exact = (template for template in TEMPLATES if LOSSLESS in template.precisions)
    return Space.union({template.name: template.space(signature, arch) for template in exact})


CPU = Implementation(TEMPLATES, default_config, starting_configs)
