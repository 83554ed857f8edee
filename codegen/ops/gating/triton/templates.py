"""gating on GPUs: the space of its Triton template, what it prints, and how its entries are launched."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.backends.triton.launch import EntryLaunch, EntryParameter, Workspace, recipe_of
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.ops.gating.problem import GatingProblem
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.implementation import Choice, Implementation
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Recipe
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config, Constraint, Parameter, Space, Value
from tilewright.codegen.tiled_work import gating_work
from tilewright.codegen.work import LaunchWork

FUSED = "gating/triton_fused"

_MOST_KEYS_PER_THREAD = 32
_MOST_PACKED_PER_THREAD = 16
"""Of 64 bits."""
_MOST_SORTED = 4096
"""A sorting network of more keys takes the compiler longer than a measurement is worth."""
_SCANNED = 4096
"""Counts that the scan goes through at once."""
_PAD_ROWS = 256


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _group_columns(signature: GatingSignature) -> int:
    return _power_of_two(signature.group_size)


def _columns(signature: GatingSignature) -> int:
    """Experts of a tile's row, every group padded to a power of two."""
    return _power_of_two(signature.groups) * _group_columns(signature)


@lru_cache(maxsize=64)
def space(signature: GatingSignature, arch: GpuArch) -> Space:
    """Tokens of a tile, and how the best of a row are found."""
    columns = _columns(signature)
    parameters = (
        Parameter("block_tokens", (1, 2, 4, 8, 16, 32, 64), "tokens of a tile"),
        Parameter(
            "pick",
            ("argmax", "packed", "sort"),
            "best experts one by one, by key and place; by both in 64 bits; or all at once by a sorting network",
        ),
        Parameter("num_warps", (1, 2, 4, 8), "warps of a program"),
    )

    def fits_registers(c: Mapping[str, Any]) -> bool:
        threads = c["num_warps"] * arch.warp_size
        most = _MOST_KEYS_PER_THREAD if c["pick"] == "argmax" else _MOST_PACKED_PER_THREAD
        return bool(c["block_tokens"] * columns <= max(most * threads, columns))

    def is_busy(c: Mapping[str, Any]) -> bool:
        return bool(c["num_warps"] == 1 or c["block_tokens"] * columns >= c["num_warps"] * arch.warp_size)

    constraints = (
        Constraint(
            "registers", fits_registers, "keys of a tile fit the registers", ("block_tokens", "pick", "num_warps")
        ),
        Constraint("busy", is_busy, "every thread has a key", ("block_tokens", "num_warps")),
        Constraint(
            "network",
            lambda c: bool(c["pick"] != "sort" or c["block_tokens"] * columns <= _MOST_SORTED),
            "a sorting network compiles in seconds",
            ("block_tokens", "pick"),
        ),
    )
    return Space.enumerate(parameters, constraints)


def default_config(signature: GatingSignature, arch: GpuArch, size: int | None) -> Choice:  # noqa: ARG001
    """One warp's worth of tokens, experts one by one: as vLLM's and SGLang's kernels do it in CUDA."""
    own = space(signature, arch)
    for tokens in (4, 2, 1):
        for warps in (4, 2, 8, 1):
            knobs: dict[str, Value] = {"block_tokens": tokens, "pick": "argmax", "num_warps": warps}
            if own.find(knobs) is not None:
                return FUSED, knobs
    return FUSED, dict(own[0])


def _tensor(name: str, kind: str, *, aligned: bool = False) -> EntryParameter:
    return EntryParameter(name, f"*{kind}", Argument("tensor", name), aligned)


def _tiles(config: Config) -> str:
    return f"ceildiv(tokens, {config['block_tokens']})"


def launches(signature: GatingSignature, config: Config) -> tuple[tuple[EntryLaunch, ...], Workspace]:
    """Launches in order, and the workspace between them."""
    workspace = Workspace()
    logits, ids = _tensor("logits", "fp32", aligned=True), _tensor("topk_ids", "i32", aligned=True)
    tokens = EntryParameter("tokens", "i32", Argument("size", "tokens"))
    bias = (_tensor("bias", "fp32", aligned=True),) if signature.bias else ()
    chosen = (logits, *bias, ids, _tensor("topk_weights", "fp32", aligned=True))
    grid, warps = (_tiles(config),), config["num_warps"]
    if signature.order == "none":
        return (EntryLaunch("choose", (*chosen, tokens), grid, num_warps=warps),), workspace
    workspace.add("counts", f"{4 * signature.experts} * {_tiles(config)}")
    counts = EntryParameter("counts", "*i32", workspace.argument("counts"), aligned=True)
    tiles = EntryParameter("tiles", "i32", Argument("size", _tiles(config)))
    offsets = _tensor("expert_offsets", "i32")
    padded: tuple[EntryParameter, ...] = ()
    begins: tuple[EntryParameter, ...] = ()
    pads: tuple[EntryLaunch, ...] = ()
    slots: tuple[EntryParameter, ...] = ()
    if signature.order == "blocks":
        workspace.add("block_begins", str(4 * (signature.experts + 1)))
        begins = (EntryParameter("block_begins", "*i32", workspace.argument("block_begins"), aligned=True),)
        padded = (_tensor("padded_rows", "i32"),)
        slots = (_tensor("sorted_slots", "i32"),)
        pad = (*begins, *slots, _tensor("block_experts", "i32"), tokens)
        pads = (EntryLaunch("pad", pad, ("blocks",), num_warps=1),)
    scan_warps = 8 if signature.experts >= 128 else 4
    return (
        EntryLaunch("choose", (*chosen, counts, tokens), grid, num_warps=warps),
        EntryLaunch("scan", (counts, offsets, *begins, *padded, tiles), ("1",), num_warps=scan_warps),
        *pads,
        EntryLaunch(
            "place",
            (
                ids,
                counts,
                offsets,
                *begins,
                _tensor("row_token", "i32"),
                _tensor("slot_row", "i32"),
                *slots,
                tokens,
            ),
            grid,
            num_warps=warps,
        ),
    ), workspace


def entries(signature: GatingSignature, config: Config, arch: GpuArch) -> tuple[EntrySpec, ...]:  # noqa: ARG001
    """For the builder, in the order of the recipe's launches."""
    return tuple(launch.spec() for launch in launches(signature, config)[0])


def recipe(signature: GatingSignature, config: Config, arch: GpuArch) -> Recipe:
    """How the kernel is called."""
    return recipe_of(signature, *launches(signature, config), arch.warp_size)


def context(signature: GatingSignature, config: Config, arch: GpuArch) -> dict[str, Any]:  # noqa: ARG001
    """Names that the template uses beside the signature and the config."""
    steps, _ = launches(signature, config)
    experts = _power_of_two(signature.experts)
    return {
        "entry_arguments": {step.entry: ", ".join(each.name for each in step.parameters) for step in steps},
        "ordered": signature.order != "none",
        "grouped": signature.groups > 1,
        "by_score": signature.ranks_by_score,
        "choices": min(_power_of_two(signature.top_k), _columns(signature)),
        "columns": _columns(signature),
        "groups_padded": _power_of_two(signature.groups),
        "group_columns": _group_columns(signature),
        "experts_padded": experts,
        "scan_tiles": max(1, min(64, _SCANNED // experts)),
        "pad_rows": min(_PAD_ROWS, _power_of_two(max(1, signature.block_size))),
    }


def emulated_problems(signature: GatingSignature, config: Config, arch: GpuArch) -> tuple[GatingProblem, ...]:  # noqa: ARG001
    """Two tiles and a part of one; then equal logits."""
    tokens = 2 * config["block_tokens"] + 1
    skewed, even = RoutingSpec.parse("power-law"), RoutingSpec.parse("balanced")
    return (
        GatingProblem(signature, tokens, skewed),
        GatingProblem(signature, config["block_tokens"] + 1, even, tied=True),
    )


def work(signature: GatingSignature, config: Config, arch: GpuArch, problem: GatingProblem) -> tuple[LaunchWork, ...]:
    """What the launches have to do."""
    tokens, experts, block = problem.tokens, signature.experts, config["block_tokens"]
    choose = gating_work("choose", tokens, experts, signature.top_k, block_tokens=block, logit_bytes=4.0)
    if signature.order == "none":
        return (choose,)
    tiles = -(-tokens // block)
    counts, choices = 4.0 * tiles * experts, 4.0 * tokens * signature.top_k
    at_once = context(signature, config, arch)["scan_tiles"]
    steps = -(-tiles // at_once)
    scan = _moving("scan", 1, steps, counts / steps, counts, 4.0 * experts)
    place = _moving("place", tiles, 1, 8.0 * (experts + block * signature.top_k), counts + choices, 2 * choices / tiles)
    if signature.order != "blocks":
        return choose, scan, place
    blocks = signature.padded_rows(tokens) // signature.block_size
    pad = _moving("pad", blocks, 1, 4.0 * experts, 0.0, 4.0 * signature.block_size)
    return choose, scan, pad, place


def _moving(
    entry: str, programs: int, steps: int, step_bytes: float, read_bytes: float, epilogue_bytes: float
) -> LaunchWork:
    """A launch that multiplies nothing, with an addition for each of 4 bytes."""
    return LaunchWork(
        entry,
        programs=programs,
        steps=steps,
        step_flops=0.0,
        mma_dtype="fp32",
        step_bytes=step_bytes,
        scalar_ops=step_bytes / 4,
        dram_bytes=read_bytes + programs * epilogue_bytes,
        epilogue_bytes=epilogue_bytes,
    )


def _layout(signature: GatingSignature, config: Config, arch: GpuArch) -> None:
    """No weight is packed."""
    del signature, config, arch


TEMPLATES = (
    Template(
        FUSED,
        "triton",
        ("cuda", "hip"),
        space,
        _layout,
        recipe,
        context,
        label=("block_tokens", "pick", "num_warps"),
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
)

TRITON = Implementation(TEMPLATES, default_config, sizes=(1, 8, 32, 128, 512, 2048))
