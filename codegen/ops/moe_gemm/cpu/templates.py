"""moe_gemm on CPUs: the spaces of its C++ templates, and what the runtime needs to call what they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tilewright.codegen.hardware.archs import CPU_ARCHS, CpuArch
from tilewright.codegen.numbers.activations import CLAMPED_ALPHA, CLAMPED_LIMIT
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.numbers.precisions import (
    CPU_PRECISIONS,
    INTEGER_PRECISIONS,
    LOSSLESS,
    Precision,
    find_precision,
)
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Launch, Recipe, TensorSpec
from tilewright.codegen.space import Config, Constraint, Parameter, Space
from tilewright.errors import TilewrightError

ENTRY = "tilewright_moe_gemm"
BLOCKED = "moe_gemm/cpu_blocked"
STREAM = "moe_gemm/cpu_stream"
INTEGER = "moe_gemm/cpu_integer"

_STREAM_BLOCK_M = 4096
"""Rows of one task of the streaming template: in effect, all of an expert."""

_MULTIPLY_ADDS_IN_FLIGHT = 8
"""Two units times four cycles, on the CPUs of today: fewer accumulators leave units idle."""

_STREAM_OPERANDS = 2
"""Registers that the streaming template needs beside its accumulators."""

_INTEGER_OPERANDS = 4
"""The same for the integer template: a word's factors (one, or even and odd bytes), activations, and products."""

_VECTORS = Parameter("vectors", (1, 2), "vectors in a row of a weight panel: the weight layout")
_CHUNK = Parameter("chunk_groups", (1, 2, 4, 8), "groups of streams in a task: cache block in n, grain of the schedule")
_SCHEDULE = Parameter("schedule", ("dynamic", "static"), "threads claim tasks one by one, or get equal shares")
_SHORT_K = 1024
"""Steps of k of which 384 rows take 1.5 MiB, as much as second caches of servers spare today."""
_PREFETCH = Parameter("prefetch", (0, 16, 64), "software prefetch distance in rows of a weight panel; 0: none")
_UNROLL = Parameter("unroll", (1, 4), "steps of k (rows of words, where weights are quantised) unrolled")
_MOST_UNROLLED = 8
"""Steps of k in an unrolled loop body over quantised weights; more only take longer to compile."""


def _combine(signature: MoeGemmSignature) -> Parameter:
    """How top-k partial results are summed; the other stages have nothing to combine."""
    values = ("direct", "partials") if signature.stage == "down" else ("none",)
    return Parameter(
        "combine", values, "sum into the output at once by column owner, or write partial rows and add them"
    )


def _gate_up(signature: MoeGemmSignature) -> Parameter:
    """How gate and up columns alternate: within a panel of two vectors, or as neighbouring panels of one."""
    values = ("interleaved", "apart") if signature.halves == 2 else ("none",)
    return Parameter("gate_up", values, "gate and up columns share a stream of weights, or have one each")


def _precision(signature: MoeGemmSignature, precisions: tuple[str, ...]) -> Parameter:
    """Precisions of the weights.

    Raises:
        TilewrightError: for one whose groups do not divide k.

    """
    for name in precisions:
        if refusal := find_precision(name).refusal(signature.k):
            raise TilewrightError(f"{signature.describe()}: {refusal}")
    return Parameter("precision", precisions, "how weights are stored: a part of the weight layout")


def _stored(config: Mapping[str, Any]) -> Precision:
    """Precision of a config's weights; templates without that knob read them as declared."""
    return find_precision(config.get("precision") or LOSSLESS)


def _whole_pairs(signature: MoeGemmSignature) -> Constraint:
    return Constraint(
        "gate_up_pairs",
        lambda c: c["vectors"] % signature.halves == 0 and (c["gate_up"] != "apart" or c["vectors"] == 2),
        "a panel holds as many gate as up vectors",
        ("vectors", "gate_up"),
    )


def _chunks_exist(signature: MoeGemmSignature, arch: CpuArch) -> Constraint:
    def holds(c: Mapping[str, Any]) -> bool:
        panels = groups_of(signature, c["vectors"], arch)
        return c["streams"] * c["chunk_groups"] == 1 or bool(c["streams"] * c["chunk_groups"] <= panels)

    knobs = ("vectors", "streams", "chunk_groups")
    return Constraint("chunk_fits_n", holds, "a task covers no more panels than there are", knobs)


def _row_blocks(signature: MoeGemmSignature) -> tuple[int, ...]:
    """Rows of a task: short rows fit the second cache in larger numbers."""
    return (96, 192, 384) if signature.k <= _SHORT_K else (48, 96, 192)


@lru_cache(maxsize=64)
def _blocked_space(signature: MoeGemmSignature, arch: CpuArch, precisions: tuple[str, ...] = (LOSSLESS,)) -> Space:
    """Register tile x cache blocks x order x packing."""
    k_blocks = tuple(block for block in (256, 512, 1024) if block < signature.k)
    parameters = (
        _precision(signature, precisions),
        _VECTORS,
        Parameter("block_rows", (2, 3, 4, 6, 8, 12), "rows of a register tile"),
        Parameter("streams", (1, 2, 3), "neighbouring weight panels of a register tile"),
        Parameter("k_block", (*k_blocks, signature.k), "steps of k between visits to the accumulators"),
        Parameter("block_m", _row_blocks(signature), "rows of one task: cache block in m; whole register tiles"),
        _CHUNK,
        Parameter("order", ("panel_outer", "rows_outer"), "what the inner loop reuses: a weight panel or a block of x"),
        Parameter("pack_x", (False, True), "copy x k-major first, so that a step of k reads neighbouring floats"),
        _UNROLL,
        _PREFETCH,
        Parameter("fetch_next", (False, True), "fetch the next panels while all rows go through these"),
        _SCHEDULE,
        _gate_up(signature),
        _combine(signature),
    )
    tile = ("vectors", "block_rows", "streams")

    def enough_registers(c: Mapping[str, Any]) -> bool:
        columns = c["streams"] * c["vectors"]
        return bool(c["block_rows"] * columns + min(columns, 2) + 1 <= arch.vector_registers)

    def busy_units(c: Mapping[str, Any]) -> bool:
        return bool(c["block_rows"] * c["streams"] * c["vectors"] >= _MULTIPLY_ADDS_IN_FLIGHT)

    constraints = (
        _whole_pairs(signature),
        Constraint(
            "fetch_order",
            lambda c: (
                not c["fetch_next"]
                or (c["order"] == "panel_outer" and c["prefetch"] == 0 and c["k_block"] == signature.k)
            ),
            "one kind of prefetch, and whole next panels to fetch while rows are gone through",
            ("order", "prefetch", "k_block", "fetch_next"),
        ),
        Constraint("registers", enough_registers, "accumulators and operands fit the registers", tile),
        Constraint("latency", busy_units, "enough accumulators to hide the latency of a multiply-add", tile),
        _chunks_exist(signature, arch),
        Constraint(
            "unpacked_once",
            lambda c: (
                not _stored(c).quantised or (c["order"] == "panel_outer" and c["prefetch"] == 0 and not c["fetch_next"])
            ),
            "quantised panels are unpacked into the cache before many rows read them there",
            ("precision", "order", "prefetch", "fetch_next"),
        ),
    )
    return Space.enumerate(parameters, constraints)


@lru_cache(maxsize=64)
def _stream_space(signature: MoeGemmSignature, arch: CpuArch, precisions: tuple[str, ...] = (LOSSLESS,)) -> Space:
    """Streams x rows that share a pass over the weights."""
    parameters = (
        _precision(signature, precisions),
        _VECTORS,
        Parameter("block_rows", (1, 2, 3, 4, 6), "rows that share one pass over the weights"),
        Parameter(
            "streams",
            (1, 2, 3, 4, 6, 8),
            "panels that one row reads side by side; more rows read fewer",
        ),
        _CHUNK,
        _UNROLL,
        _PREFETCH,
        _SCHEDULE,
        _gate_up(signature),
        _combine(signature),
    )

    def enough_registers(c: Mapping[str, Any]) -> bool:
        needed = max(c["block_rows"], c["streams"]) * c["vectors"]
        return bool(needed + _STREAM_OPERANDS <= arch.vector_registers)

    constraints = (
        _whole_pairs(signature),
        Constraint(
            "registers",
            enough_registers,
            "accumulators and operands fit the registers",
            ("vectors", "block_rows", "streams"),
        ),
        _chunks_exist(signature, arch),
        Constraint(
            "short_body",
            lambda c: not _stored(c).quantised or c["unroll"] * _stored(c).steps <= _MOST_UNROLLED,
            "a word of few bits unrolls the loop by itself",
            ("precision", "unroll"),
        ),
    )
    return Space.enumerate(parameters, constraints)


@lru_cache(maxsize=64)
def _integer_space(
    signature: MoeGemmSignature, arch: CpuArch, precisions: tuple[str, ...] = INTEGER_PRECISIONS[:1]
) -> Space:
    """Register tile x rows of a task: few rows read many streams, many rows share one."""
    parameters = (
        _precision(signature, precisions),
        _VECTORS,
        Parameter("block_rows", (1, 2, 4, 6, 12), "rows of a register tile"),
        Parameter("streams", (1, 2, 3, 4, 6), "neighbouring weight panels of a register tile"),
        Parameter("block_m", _row_blocks(signature), "rows of one task: cache block in m"),
        _CHUNK,
        Parameter("pack_x", (True,), "x is rounded into a copy first"),
        _UNROLL,
        _PREFETCH,
        Parameter("fetch_next", (False,), "no panels are fetched ahead"),
        _SCHEDULE,
        _gate_up(signature),
        _combine(signature),
    )
    tile = ("vectors", "block_rows", "streams")

    def tile_size(c: Mapping[str, Any]) -> int:
        return int(c["block_rows"] * c["streams"] * c["vectors"])

    constraints = (
        _whole_pairs(signature),
        Constraint(
            "registers",
            lambda c: tile_size(c) + _INTEGER_OPERANDS <= arch.vector_registers,
            "accumulators and operands fit the registers",
            tile,
        ),
        _chunks_exist(signature, arch),
        Constraint(
            "short_body",
            lambda c: c["unroll"] == 1 or tile_size(c) < _MULTIPLY_ADDS_IN_FLIGHT,
            "a large tile unrolls the loop by itself",
            (*tile, "unroll"),
        ),
    )
    return Space.enumerate(parameters, constraints)


def _integer_exclusion(_precision: str, arch: CpuArch) -> str | None:
    """Why products of integers are not to be had on ``arch``, in words; None where they are."""
    if arch.dot:
        return None
    better = next(a for a in CPU_ARCHS.values() if a.machine == arch.machine and a.dot)
    missing = ", ".join(sorted(set(better.features) - set(arch.features)))
    return f"it has no dot product of integers; a CPU with {missing} has, and is {better.name}"


def _layout(signature: MoeGemmSignature, config: Config, arch: CpuArch) -> WeightLayout:
    lanes = arch.lanes(4)
    columns = lanes if config["gate_up"] == "apart" else config["vectors"] * lanes
    run = lanes if signature.halves == 2 else 0
    return WeightLayout(columns=columns, halves=signature.halves, run=run, precision=_stored(config).name)


def _order(signature: MoeGemmSignature, config: Config, arch: CpuArch) -> str:
    """All templates go through k step by step with one sum for each output, whatever their tiles and blocks of k.

    What differs: scales of a group come before or after its sum, and a token's experts are added up as rows lie
    (``direct``) or as they were chosen (``partials``). Either order is the token's own.
    """
    del arch
    stored = _stored(config)
    scaled = config["template"] if stored.scales else ""
    combined = config["combine"] if signature.stage == "down" else ""
    return " ".join(part for part in (stored.name, scaled, combined) if part)


def groups_of(signature: MoeGemmSignature, vectors: int, arch: CpuArch) -> int:
    """Panels as the templates count them: ``vectors`` vectors, gate and up columns of the same outputs together."""
    out_columns = vectors * arch.lanes(4) // signature.halves
    return -(-signature.n // out_columns)


def _streams_for_rows(config: Config, arch: CpuArch) -> list[int]:
    """Panels that 1, 2, ... ``block_rows`` rows read side by side in the streaming template."""
    room = (arch.vector_registers - _STREAM_OPERANDS) // config["vectors"]
    return [max(1, min(config["streams"], room // rows)) for rows in range(1, config["block_rows"] + 1)]


def _block_m(config: Config) -> int:
    return int(config.get("block_m") or _STREAM_BLOCK_M)


def _unpacked_steps(config: Config) -> int:
    """Steps of k of a quantised panel that the blocked template unpacks at a time, rounded up to whole words."""
    steps = _stored(config).steps
    return int(-(-config["k_block"] // steps) * steps)


def _workspace(signature: MoeGemmSignature, config: Config, arch: CpuArch) -> list[tuple[str, str, str]]:
    """Parts of the workspace: name, C type, and bytes as an expression valid both in C++ and in a recipe."""
    panel = config["vectors"] * arch.lanes(4)
    parts = [("segments", "Segment *", f"12 * ({signature.experts} + rows // {_block_m(config)})")]
    if signature.stage == "down":
        parts.append(("row_slot", "int32_t *", "4 * rows"))
        if config["combine"] == "partials":
            parts.append(("partial", "float *", f"4 * rows * {signature.n}"))
    stored = _stored(config)
    if config["template"] == STREAM and stored.scales and stored.scales.dtype == "bf16_pair":
        groups = stored.groups(signature.k)
        parts.append(("x_sums", "float *", f"4 * threads * {config['block_rows'] * groups}"))
        parts.append(("x_divided", "float *", f"4 * threads * {config['block_rows'] * signature.k}"))
    if config["template"] == INTEGER:
        parts += _integer_workspace(signature, config, arch)
    elif config.get("pack_x"):
        parts.append(("packed", "float *", f"4 * rows * {signature.k}"))
    if config.get("k_block") and _stored(config).quantised:
        per_thread = config["streams"] * _unpacked_steps(config) * panel
        parts.append(("unpacked", "float *", f"4 * threads * {per_thread}"))
    if config.get("k_block") and config["k_block"] < signature.k:
        per_thread = config["block_m"] * config["streams"] * config["chunk_groups"] * panel
        parts.append(("accumulators", "float *", f"4 * threads * {per_thread}"))
    return parts


def _integer_workspace(signature: MoeGemmSignature, config: Config, arch: CpuArch) -> list[tuple[str, str, str]]:
    """Rows of x in words as ``shared/cpu_dot.jinja`` reads them, their scales, and sums of groups where needed."""
    stored, rows = _stored(config), "tokens" if signature.stage == "up" else "rows"
    groups = stored.groups(signature.k)
    words = groups * stored.group_rows(signature.k) * (2 if arch.dot == "vpmaddwd" else 1)
    parts = [("quantised", "int32_t *", f"4 * {rows} * {words}"), ("x_scales", "float *", f"4 * {rows}")]
    if arch.dot == "vpdpbusd":
        parts.append(("x_sums", "int32_t *", f"4 * {rows} * {groups}"))
    return parts


_SIZE_NAMES = {"rows": "job.rows", "tokens": "job.tokens", "threads": "host->threads", "//": "/"}
"""Of an expression in a recipe, as C++ spells them."""

_C_TYPES = {"fp32": "const float *", "int32": "const int32_t *"}


def _c_type(tensor: TensorSpec, config: Config) -> str:
    if tensor.role == "output":
        return "float *"
    quantised = tensor.name == "weight" and _stored(config).quantised
    return "const int32_t *" if quantised else _C_TYPES[tensor.dtype]


def _recipe(signature: MoeGemmSignature, config: Config, arch: CpuArch) -> Recipe:
    """One launch: the tensors' addresses, the workspace, then the dynamic sizes."""
    tensors = signature.tensors()
    sizes = ["rows"] if signature.stage == "plain" else ["tokens", "rows"]
    arguments = (
        *(Argument("tensor", t.name) for t in tensors),
        *(Argument("size", name) for name in sizes),
        Argument("workspace"),
    )
    parts = [f"({size} + 63) // 64 * 64" for _, _, size in _workspace(signature, config, arch)]
    return Recipe(
        tensors=tensors,
        launches=(Launch(artifact="", entry=ENTRY, arguments=arguments),),
        size_name=signature.size_name,
        workspace_bytes=" + ".join(parts),
        weight_layout=_layout(signature, config, arch),
    )


def _context(signature: MoeGemmSignature, config: Config, arch: CpuArch) -> dict[str, Any]:
    """Names that the templates use beside the signature and the config."""
    arguments = [(t.name, _c_type(t, config)) for t in signature.tensors()] + [
        (name, "int64_t") for name in (["rows"] if signature.stage == "plain" else ["tokens", "rows"])
    ]
    k_block = config.get("k_block") or signature.k
    return {
        "entry": ENTRY,
        "arguments": arguments,
        "workspace": [
            (name, c_type, re.sub("rows|tokens|threads|//", lambda found: _SIZE_NAMES[found[0]], size))
            for name, c_type, size in _workspace(signature, config, arch)
        ],
        "halves": signature.halves,
        "clamped_alpha": CLAMPED_ALPHA,
        "clamped_limit": CLAMPED_LIMIT,
        "panels": groups_of(signature, config["vectors"], arch),
        "ragged": signature.n % (config["vectors"] * arch.lanes(4) // signature.halves) != 0,
        "block_m": _block_m(config),
        "streams_for_rows": _streams_for_rows(config, arch),
        "stored": _stored(config),
        "row_words": _layout(signature, config, arch).columns,
        "unpacked_steps": _unpacked_steps(config) if config.get("k_block") else 0,
        "k_block": k_block,
        "k_blocks": -(-signature.k // k_block),
    }


_LABEL = ("precision", "block_rows", "streams", "vectors")

TEMPLATES = (
    Template(
        BLOCKED,
        "cpp",
        ("cpu",),
        _blocked_space,
        _layout,
        _recipe,
        _context,
        label=_LABEL,
        precisions=CPU_PRECISIONS,
        order=_order,
    ),
    Template(
        STREAM,
        "cpp",
        ("cpu",),
        _stream_space,
        _layout,
        _recipe,
        _context,
        label=_LABEL,
        precisions=CPU_PRECISIONS,
        order=_order,
    ),
    Template(
        INTEGER,
        "cpp",
        ("cpu",),
        _integer_space,
        _layout,
        _recipe,
        _context,
        label=_LABEL,
        precisions=INTEGER_PRECISIONS,
        exclusion=_integer_exclusion,
        order=_order,
    ),
)
