"""attention on CPUs: the spaces of its C++ templates, and what the runtime needs to call what they make."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tilewright.codegen.hardware.archs import CpuArch
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.implementation import Choice, Implementation
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Launch, Recipe
from tilewright.codegen.space import Config, Constraint, Parameter, Space

ENTRY = "tilewright_attention"
DECODE = "attention/cpu_decode"
PREFILL = "attention/cpu_prefill"

_ITEM_BYTES = 4
_LINE_BYTES = 64
_SHARED_TILES = 8
"""Tiles of fewer accumulators than this leave multiply-add units idle."""
_SCRATCH_MOST_BYTES = 1 << 20
"""Of one thread: what is read again and again has to stay in the second-level cache."""
_LOG2_E = 1.4426950408889634
_C_TYPES = {"fp32": "float *", "int32": "int32_t *"}


def _vectors(dim: int, arch: CpuArch) -> int:
    return -(-dim // arch.lanes(_ITEM_BYTES))


def _fits_registers(rows: int, columns: int, arch: CpuArch) -> bool:
    """Accumulators, a column of operands and the row's one."""
    return rows * columns + columns + 1 <= arch.vector_registers


@lru_cache(maxsize=64)
def _decode_space(signature: AttentionSignature, arch: CpuArch) -> Space:
    """Tiles of queries that share a read of keys and values, and how a sequence is cut."""
    group = signature.group
    parameters = (
        Parameter(
            "tile_rows",
            tuple(rows for rows in (1, 2, 3, 4, 6, 8) if rows == 1 or rows <= group),
            "queries of a register tile, which share every load",
        ),
        Parameter("tile_keys", (1, 2, 4, 8), "keys of a register tile"),
        Parameter("tile_values", (1, 2, 4, 8), "vectors of values of a register tile"),
        Parameter("block", (32, 64, 128, 256), "tokens between two visits to the softmax"),
        Parameter("chunk", (256, 512, 1024, 2048), "tokens of a sequence that one thread computes"),
        Parameter("streams", (1, 2, 4), "places of a block whose tokens are read in turn"),
        Parameter("unroll", (1, 2, 4), "steps of a loop over vectors or tokens"),
        Parameter(
            "prefetch",
            ("none", "second", "before", "along"),
            "how rows of values come to the cache: as they are summed; by instructions, as rows of keys do; read in "
            "order before they are summed, or along with the keys",
        ),
        Parameter("grain", (64, 1024), "rows of the cache that are worth another thread"),
    )

    def registers(c: Mapping[str, Any]) -> bool:
        return _fits_registers(c["tile_rows"], c["tile_keys"], arch) and _fits_registers(
            c["tile_rows"], c["tile_values"], arch
        )

    def busy(c: Mapping[str, Any]) -> bool:
        return bool(c["tile_rows"] * max(c["tile_keys"], c["tile_values"]) >= min(_SHARED_TILES, 4 * min(4, group)))

    constraints = (
        Constraint(
            "registers",
            registers,
            "accumulators and operands fit the registers",
            ("tile_rows", "tile_keys", "tile_values"),
        ),
        Constraint(
            "busy", busy, "enough sums that do not wait for each other", ("tile_rows", "tile_keys", "tile_values")
        ),
        Constraint(
            "columns",
            lambda c: bool(c["tile_values"] == 1 or c["tile_values"] <= _vectors(signature.value_dim, arch)),
            "a tile is no wider than a value",
            ("tile_values",),
        ),
    )
    return Space.enumerate(parameters, constraints)


@lru_cache(maxsize=64)
def _prefill_space(signature: AttentionSignature, arch: CpuArch) -> Space:
    """Tiles and blocks of both products."""
    parameters = (
        Parameter("tile_rows", (1, 2, 4, 6, 8, 12, 14), "queries of a register tile"),
        Parameter("key_panel", (1, 2, 3, 4), "vectors of tokens in a panel of keys"),
        Parameter("value_panel", (1, 2, 3, 4, 5, 6, 8), "vectors of columns in a panel of values"),
        Parameter("block_rows", (24, 32, 48, 64, 84, 96, 128), "queries that share a read of keys and values"),
        Parameter("block_keys", (64, 128, 192, 256, 384, 512), "tokens between two visits to the softmax"),
        Parameter("unroll", (1, 2, 4), "steps of a loop over dimensions or tokens"),
    )
    lanes = arch.lanes(_ITEM_BYTES)

    def registers(c: Mapping[str, Any]) -> bool:
        return _fits_registers(c["tile_rows"], c["key_panel"], arch) and _fits_registers(
            c["tile_rows"], c["value_panel"], arch
        )

    def busy(c: Mapping[str, Any]) -> bool:
        return bool(
            min(c["tile_rows"] * c["key_panel"], c["tile_rows"] * min(c["value_panel"], columns)) >= _SHARED_TILES
        )

    columns = _vectors(signature.value_dim, arch)
    constraints = (
        Constraint(
            "registers",
            registers,
            "accumulators and operands fit the registers",
            ("tile_rows", "key_panel", "value_panel"),
        ),
        Constraint(
            "busy", busy, "enough sums that do not wait for each other", ("tile_rows", "key_panel", "value_panel")
        ),
        Constraint(
            "columns", lambda c: bool(c["value_panel"] <= columns), "a panel is no wider than a value", ("value_panel",)
        ),
        Constraint(
            "whole_tiles",
            lambda c: bool(c["block_rows"] % c["tile_rows"] == 0),
            "a block of queries is made of whole tiles",
            ("tile_rows", "block_rows"),
        ),
        Constraint(
            "whole_panels",
            lambda c: bool(c["block_keys"] % (c["key_panel"] * lanes) == 0),
            "a block of tokens is made of whole panels",
            ("key_panel", "block_keys"),
        ),
        Constraint(
            "scratch",
            lambda c: bool(_prefill_scratch(signature, c, arch) <= _SCRATCH_MOST_BYTES),
            "what a thread works on stays in the second-level cache",
            ("block_rows", "block_keys"),
        ),
    )
    return Space.enumerate(parameters, constraints)


def _layout(signature: AttentionSignature, config: Config, arch: CpuArch) -> None:
    """No weight is packed."""
    del signature, config, arch


def _output_floats(signature: AttentionSignature, arch: CpuArch) -> int:
    """Of one output row, in whole vectors."""
    return _vectors(signature.value_dim, arch) * arch.lanes(_ITEM_BYTES)


def _lines(nbytes: int) -> int:
    """``nbytes`` in whole cache lines, which every part of a scratch begins."""
    return -(-nbytes // _LINE_BYTES) * _LINE_BYTES


def _decode_scratch(signature: AttentionSignature, config: Mapping[str, Any], arch: CpuArch) -> int:
    """Bytes of the template's struct Scratch, at the most."""
    group, block = signature.group, config["block"]
    floats = _vectors(signature.head_dim, arch) * arch.lanes(_ITEM_BYTES) + block + _output_floats(signature, arch)
    rows = group * (_ITEM_BYTES * floats + arch.vector_bytes + 2 * _ITEM_BYTES)
    return _lines(rows + 2 * 8 * block) + 4 * _LINE_BYTES


def _prefill_scratch(signature: AttentionSignature, config: Mapping[str, Any], arch: CpuArch) -> int:
    """Bytes of the template's struct Scratch, at the most."""
    floats = signature.head_dim + config["block_keys"] + _output_floats(signature, arch)
    return _lines(config["block_rows"] * (_ITEM_BYTES * floats + arch.vector_bytes + 2 * _ITEM_BYTES)) + 4 * _LINE_BYTES


def _sizes(signature: AttentionSignature) -> tuple[str, ...]:
    return ("tokens", "table_pages") if signature.stage == "decode" else ("tokens", "boundaries")


def _decode_workspace(signature: AttentionSignature, config: Config, arch: CpuArch) -> str:
    """Counters, scratch, and a result of every chunk that the block table has room for."""
    pairs = f"tokens * {signature.kv_heads}"
    partial = _ITEM_BYTES * signature.group * (_output_floats(signature, arch) + 2)
    chunks = f"ceildiv(table_pages * {signature.page_size}, {config['chunk']})"
    scratch = _decode_scratch(signature, config, arch)
    return f"ceildiv({pairs}, 16) * {_LINE_BYTES} + threads * {scratch} + {pairs} * {chunks} * {partial}"


def _prefill_workspace(signature: AttentionSignature, config: Config, arch: CpuArch) -> str:
    """Scratch, and packed keys and values; every sequence may leave a panel of keys nearly empty."""
    lanes = arch.lanes(_ITEM_BYTES)
    panel = config["key_panel"] * lanes
    panels = -(-_vectors(signature.value_dim, arch) // config["value_panel"])
    key_bytes = _ITEM_BYTES * signature.kv_heads * signature.head_dim * panel
    value_bytes = _ITEM_BYTES * signature.kv_heads * panels * config["value_panel"] * lanes
    scratch = _prefill_scratch(signature, config, arch)
    return f"threads * {scratch} + (tokens // {panel} + boundaries) * {key_bytes} + tokens * {value_bytes}"


def _recipe(signature: AttentionSignature, config: Config, arch: CpuArch) -> Recipe:
    """One launch: the tensors' addresses, the sizes, then the workspace."""
    tensors = signature.tensors()
    workspace = _decode_workspace if signature.stage == "decode" else _prefill_workspace
    arguments = (
        *(Argument("tensor", spec.name) for spec in tensors),
        *(Argument("size", name) for name in _sizes(signature)),
        Argument("workspace"),
    )
    return Recipe(
        tensors=tensors,
        launches=(Launch(artifact="", entry=ENTRY, arguments=arguments),),
        size_name=signature.size_name,
        workspace_bytes=workspace(signature, config, arch),
    )


def _halvings(lanes: int) -> list[int]:
    """Half of the lanes, a quarter, and so on to 1."""
    return [lanes >> shift for shift in range(1, lanes.bit_length())]


def _sum_lines(vectors: int, lanes: int) -> list[str]:
    """Statements that leave the sums of ``vectors`` vectors v[i] in the first floats of v: a tree of folds."""
    lines = []
    for step in _halvings(lanes):
        pairs = max(1, vectors // 2)
        lines += [
            f"v[{i}] = fold_{step}(v[{2 * i if vectors > 1 else i}], v[{2 * i + 1 if vectors > 1 else i}]);"
            for i in range(pairs)
        ]
        vectors = pairs
    return lines


def _context(signature: AttentionSignature, config: Config, arch: CpuArch) -> dict[str, Any]:
    """Names that the templates use beside the signature and the config."""
    lanes = arch.lanes(_ITEM_BYTES)
    arguments = [
        (spec.name, _C_TYPES[spec.dtype] if spec.role == "output" else f"const {_C_TYPES[spec.dtype]}")
        for spec in signature.tensors()
    ]
    scratch = _decode_scratch if signature.stage == "decode" else _prefill_scratch
    return {
        "entry": ENTRY,
        "arguments": [*arguments, *((name, "int64_t") for name in _sizes(signature))],
        "scale": f"{signature.scale * _LOG2_E!r}f",
        "lanes": lanes,
        "halvings": _halvings(lanes),
        "key_vectors": _vectors(signature.head_dim, arch),
        "value_vectors": _vectors(signature.value_dim, arch),
        "key_overlap": -signature.head_dim % lanes,
        "value_overlap": -signature.value_dim % lanes,
        "sum_lines": _sum_lines(config["tile_keys"], lanes) if signature.stage == "decode" else [],
        "scratch_bytes": scratch(signature, config, arch),
    }


def _order(signature: AttentionSignature, config: Config, arch: CpuArch) -> str:
    """Scores and values are summed token by token, rescaled after every block, and chunks put together in order."""
    del signature, arch
    knobs = ("block", "chunk", "streams") if config["template"] == DECODE else ("block_keys",)
    return " ".join(f"{knob}={config[knob]}" for knob in knobs)


def default_config(signature: AttentionSignature, arch: CpuArch, size: int | None) -> Choice:  # noqa: ARG001
    """Blocks that fit the first cache, tiles that fill the registers."""
    wide = arch.vector_registers > 16
    columns = _vectors(signature.value_dim, arch)
    if signature.stage == "decode":
        # Three rows of few registers leave too few sums that do not wait for each other.
        rows = max(rows for rows in ((1, 2, 3, 4) if wide else (1, 2, 4)) if rows == 1 or rows <= signature.group)
        return DECODE, {
            "tile_rows": rows,
            "tile_keys": 4 if wide or rows < 3 else 2,
            "tile_values": min(4 if wide or rows < 3 else 2, 1 << (columns.bit_length() - 1)),
            "block": 64,
            "chunk": 512,
            "streams": 2,
            "unroll": 1,
            "prefetch": "along",
            "grain": 64,
        }
    return PREFILL, {
        "tile_rows": 8 if wide else 4,
        "key_panel": 2,
        "value_panel": min(2, _vectors(signature.value_dim, arch)),
        "block_rows": 64,
        "block_keys": 128,
        "unroll": 1,
    }


TEMPLATES = (
    Template(
        DECODE,
        "cpp",
        ("cpu",),
        _decode_space,
        _layout,
        _recipe,
        _context,
        applies=lambda signature, _arch: signature.stage == "decode" and not signature.latent,
        label=("tile_rows", "tile_keys", "tile_values", "block", "chunk", "streams"),
        order=_order,
    ),
    Template(
        PREFILL,
        "cpp",
        ("cpu",),
        _prefill_space,
        _layout,
        _recipe,
        _context,
        applies=lambda signature, _arch: signature.stage == "prefill",
        label=("tile_rows", "key_panel", "value_panel", "block_rows", "block_keys"),
        order=_order,
    ),
)

CPU = Implementation(TEMPLATES, default_config)
