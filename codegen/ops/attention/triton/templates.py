"""attention on GPUs: what its Triton templates print, how their entries are launched, and the declarations of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.backends.triton.launch import EntryLaunch, EntryParameter, Workspace, recipe_of
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.ops.attention.inputs import split_tokens
from tilewright.codegen.ops.attention.problem import AttentionProblem
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.attention.triton.space import (
    DECODE,
    MLA_DECODE,
    PREFILL,
    decode_space,
    default_config,
    dim_parts,
    key_parts,
    power_of_two,
    prefill_space,
)
from tilewright.codegen.ops.implementation import Implementation
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Recipe
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.codegen.tiled_work import decode_attention_work, prefill_attention_work
from tilewright.codegen.work import LaunchWork

_LOG2_E = 1.4426950408889634
_COMBINED_VALUES = 8192
"""Values that one program of the combination holds: 64 for each of 128 threads."""
_POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp8_e4m3": "*fp8e4nv"}


@dataclass(frozen=True)
class _Partials:
    """Results of parts of sequences, between the two launches of decode."""

    workspace: Workspace
    parts: EntryParameter
    magnitudes: EntryParameter


def _tensor(name: str, pointer: str, *, aligned: bool = False) -> EntryParameter:
    return EntryParameter(name, pointer, Argument("tensor", name), aligned)


def _sinks(signature: AttentionSignature) -> tuple[EntryParameter, ...]:
    return (_tensor("sinks", "*fp32"),) if signature.sinks else ()


def _out(signature: AttentionSignature) -> EntryParameter:
    return _tensor("out", _POINTERS[signature.out_dtype], aligned=True)


def _partials(signature: AttentionSignature, config: Config) -> _Partials:
    """Per token, head and split: a row of values, and the logarithm of its sum of exponentials."""
    workspace = Workspace()
    count = f"tokens * {signature.heads * config['splits']}"
    workspace.add("parts", f"{4 * signature.value_dim} * {count}")
    workspace.add("magnitudes", f"4 * {count}")
    return _Partials(
        workspace,
        EntryParameter("parts", "*fp32", workspace.argument("parts"), aligned=True),
        EntryParameter("magnitudes", "*fp32", workspace.argument("magnitudes"), aligned=True),
    )


def _combine_columns(signature: AttentionSignature, config: Config) -> int:
    """Columns of a row that one program of the combination computes."""
    return int(min(power_of_two(signature.value_dim), max(16, _COMBINED_VALUES // config["splits"])))


def _decode_launches(signature: AttentionSignature, config: Config) -> tuple[tuple[EntryLaunch, ...], Workspace]:
    keys = _POINTERS[signature.kv_dtype]
    caches = ("kv_cache",) if signature.latent else ("k_cache", "v_cache")
    inputs = (
        _tensor("q", _POINTERS[signature.q_dtype], aligned=True),
        *(_tensor(name, keys, aligned=True) for name in caches),
        _tensor("block_table", "*i32"),
        _tensor("lengths", "*i32"),
    )
    pages = EntryParameter("table_pages", "i32", Argument("size", "table_pages"))
    row_tiles = -(-signature.group // config["block_rows"])
    grid = ("tokens", str(signature.kv_heads * row_tiles))
    common = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    if config["splits"] == 1:
        parameters = (*inputs, *_sinks(signature), _out(signature), pages)
        return (EntryLaunch("decode", parameters, grid, **common),), Workspace()
    partials = _partials(signature, config)
    columns = _combine_columns(signature, config)
    decode = EntryLaunch(
        "decode", (*inputs, partials.parts, partials.magnitudes, pages), (*grid, str(config["splits"])), **common
    )
    combine = EntryLaunch(
        "combine",
        (partials.parts, partials.magnitudes, *_sinks(signature), _out(signature)),
        grid=("tokens", str(signature.heads), str(-(-signature.value_dim // columns))),
        num_warps=max(1, min(4, columns * config["splits"] // 1024)),
    )
    return (decode, combine), partials.workspace


def _prefill_launches(signature: AttentionSignature, config: Config) -> tuple[tuple[EntryLaunch, ...], Workspace]:
    keys = _POINTERS[signature.kv_dtype]
    sequences = "boundaries - 1"
    parameters = (
        _tensor("q", _POINTERS[signature.q_dtype], aligned=True),
        _tensor("k", keys, aligned=True),
        _tensor("v", keys, aligned=True),
        _tensor("cu_seqlens", "*i32"),
        *_sinks(signature),
        _out(signature),
        EntryParameter("sequences", "i32", Argument("size", sequences)),
    )
    # A sequence may begin within what a whole number of tiles would cover, once for each.
    tiles = f"tokens // {_block_q(config)} + {sequences}"
    grid = (f"({tiles}) * {_head_tiles(signature, config)}",)
    launch = EntryLaunch("prefill", parameters, grid, num_warps=config["num_warps"], num_stages=config["num_stages"])
    return (launch,), Workspace()


def _block_q(config: Config) -> int:
    return int(config["block_m"] // config["packed"])


def _head_tiles(signature: AttentionSignature, config: Config) -> int:
    return int(signature.kv_heads * -(-signature.group // config["packed"]))


def launches(signature: AttentionSignature, config: Config) -> tuple[tuple[EntryLaunch, ...], Workspace]:
    """Launches in order, and the workspace between them."""
    return (_decode_launches if signature.stage == "decode" else _prefill_launches)(signature, config)


def entries(signature: AttentionSignature, config: Config, arch: GpuArch) -> tuple[EntrySpec, ...]:  # noqa: ARG001
    """For the builder, in the order of the recipe's launches."""
    return tuple(launch.spec() for launch in launches(signature, config)[0])


def recipe(signature: AttentionSignature, config: Config, arch: GpuArch) -> Recipe:
    """How the kernel is called."""
    return recipe_of(signature, *launches(signature, config), arch.warp_size)


def context(signature: AttentionSignature, config: Config, arch: GpuArch) -> dict[str, Any]:  # noqa: ARG001
    """Names that the templates use beside the signature and the config."""
    steps, _ = launches(signature, config)
    widened = "" if signature.kv_dtype == signature.q_dtype else ".to(q.dtype.element_ty)"
    names: dict[str, Any] = {
        "entry_arguments": {step.entry: ", ".join(each.name for each in step.parameters) for step in steps},
        "scale": repr(signature.scale * _LOG2_E),
        "log2_e": repr(_LOG2_E),
        "key_parts": key_parts(signature),
        "value_parts": dim_parts(signature.value_dim),
        "widened": widened,
    }
    if signature.stage == "decode":
        return names | {
            "final": config["splits"] == 1,
            "keys_first": config["operands"] == "keys_first",
            "row_tiles": -(-signature.group // config["block_rows"]),
            "whole_pages": signature.page_size % config["block_kv"] == 0,
            "combine_columns": _combine_columns(signature, config),
        }
    return names | {
        "final": True,
        "keys_first": False,
        "block_q": _block_q(config),
        "head_tiles": _head_tiles(signature, config),
        "tiles_of_group": -(-signature.group // config["packed"]),
    }


def emulated_problems(
    signature: AttentionSignature,
    config: Config,
    arch: GpuArch,  # noqa: ARG001
) -> tuple[AttentionProblem, ...]:
    """A sequence of three tiles or more, ragged, beside a shorter one; then short ones of more heads, scores far apart.

    Groups keep the remainder that they leave in tiles; a window is made short enough to end within these sequences.
    """
    block = config["block_kv"]
    rows = config["block_rows"] if signature.stage == "decode" else config["packed"]
    ragged = signature.group % rows
    group = min(signature.group, rows + ragged if ragged else 2 * rows)
    one = replace(signature, kv_heads=1, heads=group, window=min(signature.window, block + block // 2 + 1))
    kv_heads = min(2, signature.kv_heads)
    # Where heads are of one group, two tiles of it once are enough.
    two = replace(one, kv_heads=kv_heads, heads=kv_heads * group if kv_heads > 1 else min(group, rows))
    uneven = RoutingSpec.parse("power-law")
    if signature.stage == "decode":
        # The longer of two sequences has two thirds of the tokens.
        context = (3 * block * min(config["splits"], 2) + 5) * 3 // 4
        return (
            AttentionProblem(one, 2, context, uneven),
            AttentionProblem(two, 2, block // 2 + 1, uneven, steep=True),
        )
    longest = max(_block_q(config), 2 * block) + 3
    return (
        AttentionProblem(one, longest + longest // 2, longest, uneven),
        AttentionProblem(two, _block_q(config) + 3, _block_q(config) + 1, uneven, steep=True),
    )


def work(
    signature: AttentionSignature, config: Config, arch: GpuArch, problem: AttentionProblem
) -> tuple[LaunchWork, ...]:
    """What the launches have to do."""
    del arch
    lengths = split_tokens(problem.routing, *problem.lengths_total, 0).astype(np.int64)
    kv_bytes = float(ITEMSIZE[signature.kv_dtype])
    shape = {
        "heads": signature.heads,
        "kv_heads": signature.kv_heads,
        "head_dim": signature.head_dim,
        "value_dim": signature.value_dim,
        "window": signature.window,
    }
    if signature.stage == "prefill":
        return (
            prefill_attention_work(
                "prefill",
                lengths,
                **shape,
                block_q=_block_q(config),
                packed=config["packed"],
                block_kv=config["block_kv"],
                dtype=signature.q_dtype,
                kv_bytes=kv_bytes,
            ),
        )
    decode = decode_attention_work(
        "decode",
        lengths,
        **shape,
        block_kv=config["block_kv"],
        splits=config["splits"],
        dtype=signature.q_dtype,
        kv_bytes=kv_bytes,
        kv_elements=signature.kv_elements,
        block_rows=config["block_rows"],
    )
    return (decode,) if config["splits"] == 1 else (decode, _combine_work(signature, config, problem.tokens))


def _combine_work(signature: AttentionSignature, config: Config, tokens: int) -> LaunchWork:
    columns = _combine_columns(signature, config)
    rows, splits = tokens * signature.heads, config["splits"]
    value_bytes = 4.0 * splits + ITEMSIZE[signature.out_dtype]
    return LaunchWork(
        "combine",
        programs=rows * -(-signature.value_dim // columns),
        steps=1,
        step_flops=0.0,
        mma_dtype="fp32",
        step_bytes=4.0 * splits * (columns + 1),
        scalar_ops=2.0 * splits * columns,
        dram_bytes=rows * signature.value_dim * value_bytes,
        epilogue_bytes=float(columns * ITEMSIZE[signature.out_dtype]),
    )


def _layout(signature: AttentionSignature, config: Config, arch: GpuArch) -> None:
    """No weight is packed."""
    del signature, config, arch


def _converts(signature: AttentionSignature, arch: GpuArch) -> bool:
    """fp8 keys and values need the instructions that convert them."""
    return signature.kv_dtype != "fp8_e4m3" or "fp8_mma" in arch.capabilities


def _decodes(signature: AttentionSignature, arch: GpuArch) -> bool:
    return signature.stage == "decode" and not signature.latent and _converts(signature, arch)


def _decodes_latent(signature: AttentionSignature, arch: GpuArch) -> bool:
    return signature.latent and _converts(signature, arch)


def _prefills(signature: AttentionSignature, arch: GpuArch) -> bool:
    return signature.stage == "prefill" and _converts(signature, arch)


_DTYPES = ("bf16", "fp16")
_DECODE_LABEL = ("block_rows", "block_kv", "splits", "operands", "num_warps", "num_stages")

TEMPLATES = (
    Template(
        DECODE,
        "triton",
        ("cuda", "hip"),
        decode_space,
        _layout,
        recipe,
        context,
        applies=_decodes,
        label=_DECODE_LABEL,
        dtypes=_DTYPES,
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
    Template(
        MLA_DECODE,
        "triton",
        ("cuda", "hip"),
        decode_space,
        _layout,
        recipe,
        context,
        applies=_decodes_latent,
        label=_DECODE_LABEL,
        dtypes=_DTYPES,
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
    Template(
        PREFILL,
        "triton",
        ("cuda", "hip"),
        prefill_space,
        _layout,
        recipe,
        context,
        applies=_prefills,
        label=("block_m", "packed", "block_kv", "masks", "num_warps", "num_stages"),
        dtypes=_DTYPES,
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
)

TRITON = Implementation(TEMPLATES, default_config)
