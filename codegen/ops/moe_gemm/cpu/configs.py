"""moe_gemm on CPUs: the config that needs no search, and those that a search begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tilewright.codegen.hardware.archs import CpuArch
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.implementation import Choice, Implementation
from tilewright.codegen.ops.moe_gemm.cpu.templates import BLOCKED, INTEGER, STREAM, TEMPLATES, groups_of
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.space import Value

_TEMPLATES = {template.name: template for template in TEMPLATES}


def default_config(signature: MoeGemmSignature, arch: CpuArch, size: int | None = None) -> Choice:  # noqa: ARG001
    """Six rows by two vectors (twelve accumulators), packed x, k in blocks that keep a panel in the first cache."""
    own: dict[str, Value] = {
        "precision": LOSSLESS,
        "vectors": 2,
        "block_rows": 6,
        "streams": 1,
        "k_block": min(256, signature.k),
        "block_m": 96,
        "chunk_groups": _chunk_groups(signature, arch),
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


def starting_configs(signature: MoeGemmSignature, arch: CpuArch, precisions: Sequence[str]) -> tuple[Choice, ...]:
    """What won on machines that were tuned: narrow panels side by side for few rows; for many, next panels fetched.

    Of every precision, one for few rows and one for many, in one weight layout. Left out are precisions that a template
    does not read on ``arch``, and tiles that are wider than the weights.
    """
    halves = signature.halves
    # Vectors of one panel, of which half are gates where gate and up lie apart, so that columns are as few.
    narrow: dict[str, Value] = {"vectors": 1, "gate_up": "none"}
    wide: dict[str, Value] = {"vectors": 2, "gate_up": "none"}
    if halves == 2:
        narrow, wide = {"vectors": 2, "gate_up": "apart"}, {"vectors": 2, "gate_up": "interleaved"}

    def tile(name: str, rows: int, streams: int, panel: dict[str, Value], precision: str) -> Iterator[Choice]:
        template = _TEMPLATES[name]
        if precision not in template.precisions or template.exclusion(precision, arch):
            return
        streams = streams // halves if panel is narrow else streams
        chunk_groups = _chunk_groups(signature, arch)
        if streams * chunk_groups > groups_of(signature, int(panel["vectors"]), arch):
            return
        knobs: dict[str, Value] = {
            **panel,
            "precision": precision,
            "block_rows": rows,
            "streams": streams,
            "chunk_groups": chunk_groups,
            "unroll": 1,
            "prefetch": 0,
            "schedule": "dynamic",
            "combine": "partials" if signature.stage == "down" else "none",
        }
        if name != STREAM:
            exact = name == BLOCKED and precision == LOSSLESS
            knobs |= {"block_m": 96, "pack_x": name == INTEGER, "fetch_next": exact}
        if name == BLOCKED:
            knobs |= {"k_block": signature.k, "order": "panel_outer"}
        yield name, knobs

    exact = [name for name in precisions if name == LOSSLESS]
    of_each = (
        *(tile(STREAM, 2, 8, narrow, name) for name in precisions),
        *(tile(INTEGER, 1, 6, narrow, name) for name in precisions),
        *(tile(STREAM, 4, 4, narrow, name) for name in exact),
        *(tile(BLOCKED, 6, 2, narrow, name) for name in precisions),
        *(tile(INTEGER, 6, 2, narrow, name) for name in precisions),
        *(tile(BLOCKED, 6, 1, wide, name) for name in exact),
    )
    return tuple(choice for choices in of_each for choice in choices)


def _chunk_groups(signature: MoeGemmSignature, arch: CpuArch) -> int:
    """Groups of streams in a task: up to four, and no more than there are panels of two vectors."""
    return max(groups for groups in (1, 2, 4) if groups <= max(groups_of(signature, 2, arch), 1))


CPU = Implementation(TEMPLATES, default_config, starting_configs)
