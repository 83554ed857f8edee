"""gating on CPUs: the spaces of its C++ templates, and what the runtime needs to call what they make."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tilewright.codegen.hardware.archs import CpuArch
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.implementation import Choice, Implementation
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Launch, Recipe
from tilewright.codegen.space import Config, Constraint, Parameter, Space

ENTRY = "tilewright_gating"
INSERT = "gating/cpu_insert"
THRESHOLD = "gating/cpu_threshold"
LANES = "gating/cpu_lanes"

_CANDIDATES = 64
"""Keys that the threshold template ranks by counting: about three times what random keys give."""
_LINE_COUNTS = 16
"""Counters of 4 bytes in a cache line."""

_GRAIN = Parameter("grain", (8, 32, 128, 512), "tokens that are worth another thread")
_INSERTION = Parameter("insertion", ("branches", "selects"), "how a key gets to its place among the best")
_C_TYPES = {"fp32": "float *", "int32": "int32_t *"}


def _scatter(signature: GatingSignature) -> Parameter:
    """Who writes the order of rows; without one there is nothing to write."""
    values = ("none",) if signature.order == "none" else ("serial", "parallel")
    return Parameter("scatter", values, "rows are put in order by the calling thread, or by all")


@lru_cache(maxsize=64)
def _insert_space(signature: GatingSignature, arch: CpuArch) -> Space:
    """Vectors that one branch decides about."""
    del arch
    parameters = (
        Parameter("check", (1, 2, 4), "vectors of keys that one branch decides about"),
        _INSERTION,
        _GRAIN,
        _scatter(signature),
    )
    return Space.enumerate(parameters, ())


def _columns(signature: GatingSignature, arch: CpuArch) -> tuple[int, ...]:
    """Vectors of column maxima: at least ``top_k`` columns, and not many without an expert where fewer would do."""
    lanes = arch.lanes(4)
    enough = tuple(c for c in (1, 2, 4) if signature.top_k <= c * lanes)
    return enough[:1] + tuple(c for c in enough[1:] if c * lanes < signature.experts + lanes)


@lru_cache(maxsize=64)
def _threshold_space(signature: GatingSignature, arch: CpuArch) -> Space:
    """Columns whose maxima bound the chosen keys from below: more of them bound closer."""
    parameters = (
        Parameter("columns", _columns(signature, arch), "vectors of column maxima"),
        Parameter("insertion", ("branches",), "how a key gets to its place among the best, where many are equal"),
        _GRAIN,
        _scatter(signature),
    )
    return Space.enumerate(parameters, ())


def _fits_lanes(signature: GatingSignature, arch: CpuArch) -> bool:
    """Groups are ranked token by token; and lists that spill at every step have lost before they begin."""
    return signature.groups == 1 and signature.top_k <= arch.vector_registers


@lru_cache(maxsize=64)
def _lanes_space(signature: GatingSignature, arch: CpuArch) -> Space:
    """Vectors of tokens side by side, whose chains of comparisons overlap."""
    parameters = (
        Parameter("vectors", (1, 2), "vectors of tokens that are processed together"),
        Parameter("skip", (False, True), "pass over an expert that is among the best of no token"),
        _GRAIN,
        _scatter(signature),
    )
    constraints = (
        Constraint(
            "registers",
            lambda c: bool(signature.top_k * c["vectors"] <= arch.vector_registers),
            "the best keys stay in registers, their ids beside them in the first cache",
            ("vectors",),
        ),
    )
    return Space.enumerate(parameters, constraints)


def _layout(signature: GatingSignature, config: Config, arch: CpuArch) -> None:
    """No weight is packed."""
    del signature, config, arch


def _sizes(signature: GatingSignature) -> tuple[str, ...]:
    return ("tokens", "padded", "blocks") if signature.order == "blocks" else ("tokens",)


def _count_stride(signature: GatingSignature) -> int:
    """Counters of a unit of tokens, in whole cache lines."""
    return -(-signature.experts // _LINE_COUNTS) * _LINE_COUNTS


def _recipe(signature: GatingSignature, config: Config, arch: CpuArch) -> Recipe:
    """One launch: the tensors' addresses, the sizes, then the workspace, where an order is made."""
    del config, arch
    tensors = signature.tensors()
    workspace = "0"
    if signature.order != "none":
        shifts = signature.experts if signature.order == "blocks" else 0
        workspace = f"4 * ({_count_stride(signature)} * threads + {shifts})"
    arguments = (
        *(Argument("tensor", spec.name) for spec in tensors),
        *(Argument("size", name) for name in _sizes(signature)),
        *((Argument("workspace"),) if signature.order != "none" else ()),
    )
    return Recipe(
        tensors=tensors,
        launches=(Launch(artifact="", entry=ENTRY, arguments=arguments),),
        size_name=signature.size_name,
        workspace_bytes=workspace,
    )


def _context(signature: GatingSignature, config: Config, arch: CpuArch) -> dict[str, Any]:
    """Names that the templates use beside the signature and the config."""
    del config
    lanes = arch.lanes(4)
    arguments = [
        (spec.name, _C_TYPES[spec.dtype] if spec.role == "output" else f"const {_C_TYPES[spec.dtype]}")
        for spec in signature.tensors()
    ]
    return {
        "entry": ENTRY,
        "arguments": [*arguments, *((name, "int64_t") for name in _sizes(signature))],
        "scale": f"{signature.scale!r}f",
        "count_stride": _count_stride(signature),
        "candidates": _CANDIDATES,
        "ranks_by_score": signature.ranks_by_score,
        "grouped": signature.groups > 1,
        "vector_groups": signature.group_size % lanes == 0,
        "copies": signature.ranks_by_score or signature.groups > 1 or signature.experts % lanes != 0,
        "full_mask": hex((1 << lanes) - 1),
    }


def _order(signature: GatingSignature, config: Config, arch: CpuArch) -> str:
    """Weights of a token are summed over vectors of its experts, or one by one where every token has a lane."""
    del signature, arch
    return "lanes" if config["template"] == LANES else "rows"


def default_config(signature: GatingSignature, arch: CpuArch, size: int | None) -> Choice:  # noqa: ARG001
    """Sorted insertion, token by token, as one would write it by hand."""
    return INSERT, {
        "check": 1,
        "insertion": "branches",
        "grain": 32,
        "scatter": "none" if signature.order == "none" else "serial",
    }


TEMPLATES = (
    Template(
        INSERT,
        "cpp",
        ("cpu",),
        _insert_space,
        _layout,
        _recipe,
        _context,
        label=("check", "insertion", "grain"),
        order=_order,
    ),
    Template(
        THRESHOLD,
        "cpp",
        ("cpu",),
        _threshold_space,
        _layout,
        _recipe,
        _context,
        applies=lambda signature, arch: bool(_columns(signature, arch)),
        label=("columns", "grain"),
        order=_order,
    ),
    Template(
        LANES,
        "cpp",
        ("cpu",),
        _lanes_space,
        _layout,
        _recipe,
        _context,
        applies=_fits_lanes,
        label=("vectors", "skip", "grain"),
        order=_order,
    ),
)

CPU = Implementation(TEMPLATES, default_config)
