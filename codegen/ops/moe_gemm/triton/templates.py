"""moe_gemm on GPUs: what its Triton templates print, how their entries are launched, and the declarations of both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.codegen.backends.triton.launch import EntryLaunch, EntryParameter, Workspace, recipe_of
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.numbers.activations import CLAMPED_ALPHA, CLAMPED_LIMIT
from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.precisions import GPU_PRECISIONS, Precision, ScaleSpec, find_precision
from tilewright.codegen.ops.implementation import Choice, Implementation
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.moe_gemm.triton.space import (
    GROUPED,
    LEAST_SPLIT_K,
    PERSISTENT,
    SPLIT_K,
    decodes,
    default_knobs,
    exclusion,
    grouped_space,
    maps_fit,
    persistent_exclusion,
    persistent_space,
    split_k_space,
    stored,
)
from tilewright.codegen.ops.moe_gemm.triton.work import grouped_work
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import Argument, Recipe, TensorMap
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.codegen.work import LaunchWork

_MANY_TOKENS = 1024
"""For the default config of a signature, without a problem."""
_MOST_COMBINED_COLUMNS = 1024
"""Output columns that one program of the combination adds up: 8 for each of 128 threads."""

_POINTERS = {
    "fp32": "*fp32",
    "bf16": "*bf16",
    "fp16": "*fp16",
    "int8": "*i8",
    "int4": "*u8",
    "fp4_e2m1": "*u8",
    "fp8_e4m3": "*fp8e4nv",
}
_FNUZ_POINTER = "*fp8e4b8"
"""To AMD's own e4m3 (CDNA3), which has the same bits for half the value; only its 0x80 is no zero but NaN."""
_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "i8": 1, "u8": 1, "fp8e4nv": 1}
_TYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16"}
_SCALE_POINTERS = {"fp32": "*fp32", "bf16_pair": "*u32", "e8m0": "*u8", "e4m3": "*u8"}


def layout(signature: MoeGemmSignature, config: Config, arch: GpuArch) -> RowLayout:  # noqa: ARG001
    """Rows of elements, the scales behind them."""
    precision = stored(config)
    if precision.bits != 4:
        return RowLayout(precision.name)
    return RowLayout(precision.name, "pairs" if precision.x_dtype else "runs")


def launches(signature: MoeGemmSignature, config: Config, arch: GpuArch) -> tuple[tuple[EntryLaunch, ...], Workspace]:
    """Launches in order, and the workspace between them."""
    precision, workspace = stored(config), Workspace()
    before = _quantise_launches(signature, precision, arch, workspace)
    gemm = _gemm_parameters(signature, config, arch, workspace)
    splits = parts_of_k(config)
    if signature.stage != "down" and splits == 1:
        return (*before, _gemm_launch(signature, config, (*gemm, _out(signature)))), workspace
    dtype = "fp32" if config["partials"] == "fp32" else signature.out_dtype
    width = signature.n if splits == 1 else signature.halves * signature.n
    workspace.add("partials", f"{ITEMSIZE[dtype] * splits * width} * rows")
    partials = EntryParameter("partials", _POINTERS[dtype], workspace.argument("partials"), aligned=True)
    columns = combine_columns(signature)
    tiles, warps = str(-(-signature.n // columns)), max(1, columns // 256)
    if signature.stage == "down":
        routing = (_tensor("slot_row", "*i32"), _tensor("topk_weights", "*fp32"))
        last = EntryLaunch("combine", (partials, *routing, _out(signature)), ("tokens", tiles), num_warps=warps)
    else:
        last = EntryLaunch("join", (partials, _out(signature)), ("rows", tiles), num_warps=warps)
    return (*before, _gemm_launch(signature, config, (*gemm, partials)), last), workspace


def parts_of_k(config: Config) -> int:
    """Programs that share the sum of a tile."""
    return int(config.get("splits") or 1)


def _gemm_launch(signature: MoeGemmSignature, config: Config, parameters: tuple[EntryParameter, ...]) -> EntryLaunch:
    splits = parts_of_k(config)
    tiles = f"{most_tiles_m(signature, config)} * {tiles_n(signature, config)}"
    if blocks := config.get("blocks_per_sm"):
        tiles = f"min({tiles}, {blocks} * sm_count)"
    return EntryLaunch(
        "moe_gemm",
        parameters,
        grid=(tiles,) if splits == 1 else (tiles, str(splits)),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def most_tiles_m(signature: MoeGemmSignature, config: Config) -> str:
    """Most tiles in m that rows can make, whatever experts they fall on: every expert may leave one nearly empty."""
    return f"min(rows, rows // {config['block_m']} + {signature.experts})"


def tiles_n(signature: MoeGemmSignature, config: Config) -> int:
    """Tiles in n."""
    return int(-(-signature.n // config["block_n"]))


def combine_columns(signature: MoeGemmSignature) -> int:
    """Output columns of one program of the combination."""
    return min(_MOST_COMBINED_COLUMNS, max(256, power_of_two(signature.n)))


def power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _tensor(name: str, pointer: str, *, aligned: bool = False) -> EntryParameter:
    return EntryParameter(name, pointer, Argument("tensor", name), aligned)


def _out(signature: MoeGemmSignature) -> EntryParameter:
    return _tensor("out", _POINTERS[signature.out_dtype], aligned=True)


def _quantise_launches(
    signature: MoeGemmSignature, precision: Precision, arch: GpuArch, workspace: Workspace
) -> tuple[EntryLaunch, ...]:
    """Activations to few bits, where the precision says so; elements and scales go to the workspace."""
    if precision.x_scales is None:
        return ()
    rows = _x_rows(signature)
    x = _tensor("x", _POINTERS[signature.x_dtype], aligned=True)
    workspace.add("x_codes", f"{rows} * {signature.k * precision.x_bits // 8}")
    match precision.x_scales.granularity:
        case "tensor":
            size = "4"
        case "channel":
            size = f"4 * {rows}"
        case _:
            itemsize = precision.x_scales.itemsize
            size = f"{itemsize * (signature.k // precision.x_scales.group)} * {rows}"
    workspace.add("x_scales", size)
    if precision.x_scales.outer:
        workspace.add("x_outer_scales", f"4 * {rows}")
    codes, *scales = _x_operands(precision, arch, workspace)
    warps = min(8, max(1, power_of_two(signature.k) // 512))
    if precision.x_scales.granularity != "tensor":
        return (EntryLaunch("quantise", (x, codes, *scales), grid=(rows,), num_warps=warps),)
    workspace.add("peaks", f"4 * {rows}")
    peaks = EntryParameter("peaks", "*fp32", workspace.argument("peaks"), aligned=True)
    count = EntryParameter("x_rows", "i32", Argument("size", rows))
    return (
        EntryLaunch("row_peaks", (x, peaks), grid=(rows,), num_warps=warps),
        EntryLaunch("quantise", (x, peaks, codes, *scales, count), grid=(rows,), num_warps=warps),
    )


def _x_rows(signature: MoeGemmSignature) -> str:
    return "tokens" if signature.stage == "up" else "rows"


def _x_operands(precision: Precision, arch: GpuArch, workspace: Workspace) -> list[EntryParameter]:
    """Elements, their scales, and the scales of these where there are any."""
    assert precision.x_scales is not None
    pointers = {
        "x_codes": _multiplied_pointer(precision.x_dtype, arch),
        "x_scales": _scale_pointer(precision, precision.x_scales),
    }
    if precision.x_scales.outer:
        pointers["x_outer_scales"] = "*fp32"
    return [EntryParameter(name, kind, workspace.argument(name), aligned=True) for name, kind in pointers.items()]


def halves_fp8(arch: GpuArch) -> bool:
    """Whether the matrix unit takes the bits of an e4m3 number for half of it."""
    return "fp8_fnuz" in arch.capabilities


def _multiplied_pointer(dtype: str, arch: GpuArch) -> str:
    """To elements that the matrix unit multiplies."""
    return _FNUZ_POINTER if dtype == "fp8_e4m3" and halves_fp8(arch) else _POINTERS[dtype]


def _scale_pointer(precision: Precision, scales: ScaleSpec) -> str:
    """The matrix unit is told by the type which scales it gets; where a kernel decodes them, they are bytes."""
    if precision.scaled_by_matrix_unit and scales.dtype == "e4m3":
        return "*fp8e4nv"
    return _SCALE_POINTERS[scales.dtype]


def _gemm_parameters(
    signature: MoeGemmSignature, config: Config, arch: GpuArch, workspace: Workspace
) -> tuple[EntryParameter, ...]:
    """Everything but where results go."""
    precision = stored(config)
    scales: list[EntryParameter] = []
    x = _tensor("x", _POINTERS[signature.x_dtype], aligned=True)
    if precision.x_scales is not None:
        codes, *scales = _x_operands(precision, arch, workspace)
        x = EntryParameter("x", codes.type, codes.argument, aligned=True)
    weight = _tensor("weight", _multiplied_pointer(precision.dtype, arch), aligned=True)
    if config["template"] == PERSISTENT:
        per_byte = 8 // precision.bits or 1
        rows, row_bytes = signature.experts * signature.halves * signature.n, signature.k // per_byte
        weight = _mapped(weight, (str(rows), str(row_bytes)), (config["block_n"], config["block_k"] // per_byte))
        if kind := x_map(signature, config):
            x_per_byte = 2 if precision.x_bits == 4 else 1
            box = (1 if kind == "gather" else config["block_m"], config["block_k"] // x_per_byte)
            x = _mapped(x, (_x_rows(signature), str(signature.k // x_per_byte)), box)
    parameters = [x, *scales, weight]
    if precision.scales is not None:
        shape = (signature.experts, signature.halves * signature.n, signature.k)
        rows_layout, pointer = RowLayout(precision.name), _scale_pointer(precision, precision.scales)
        at = Argument("scales", str(rows_layout.scale_offset(*shape)))
        parameters.append(EntryParameter("scales", pointer, at, aligned=True))
        if precision.scales.outer:
            at = Argument("scales", str(rows_layout.outer_offset(*shape)))
            parameters.append(EntryParameter("outer_scales", "*fp32", at, aligned=True))
    if signature.bias:
        parameters.append(_tensor("bias", "*fp32", aligned=True))
    if signature.stage == "up":
        parameters.append(_tensor("row_token", "*i32"))
    parameters.append(_tensor("expert_offsets", "*i32"))
    return tuple(parameters)


def x_map(signature: MoeGemmSignature, config: Config) -> str:
    """How a tensor map brings rows of x: a ``tile`` of neighbours, a ``gather`` of tokens' rows; empty: by pointers."""
    if config.get("x_loads") != "tensor_map":
        return ""
    return "gather" if signature.stage == "up" else "tile"


def _mapped(parameter: EntryParameter, shape: tuple[str, str], box: tuple[int, int]) -> EntryParameter:
    """A parameter passed as a tensor map over ``shape``, of which a copy fetches ``box``."""
    element = parameter.type.removeprefix("*")
    argument = replace(parameter.argument, map=TensorMap(shape, _ELEMENT_BYTES[element]))
    return replace(parameter, type=f"tensordesc<{element}[{box[0]}, {box[1]}]>", argument=argument)


def entries(signature: MoeGemmSignature, config: Config, arch: GpuArch) -> tuple[EntrySpec, ...]:
    """For the builder, in the order of the recipe's launches."""
    return tuple(launch.spec() for launch in launches(signature, config, arch)[0])


def recipe(signature: MoeGemmSignature, config: Config, arch: GpuArch) -> Recipe:
    """How the kernel is called."""
    return recipe_of(signature, *launches(signature, config, arch), arch.warp_size, layout(signature, config, arch))


def context(signature: MoeGemmSignature, config: Config, arch: GpuArch) -> dict[str, Any]:
    """Names that the templates use beside the signature and the config."""
    precision = stored(config)
    group = precision.group(signature.k) if precision.scales and precision.scales.group else 0
    steps = -(-signature.k // config["block_k"])
    parts = {"none": (("out", ""),), "two_dots": (("gate", ""), ("up", " + N")), "interleaved": (("pair", ""),)}
    return {
        "halves": signature.halves,
        "stored": precision,
        "lossless": precision.scales is None,
        "decodes": decodes(precision),
        "halves_fp8": halves_fp8(arch),
        "group": group,
        "groups": max(1, config["block_k"] // group) if group else 0,
        "scale_rows": -(-signature.halves * signature.n // 128),
        "weight_map": config["template"] == PERSISTENT,
        "x_map": x_map(signature, config),
        "x_element": _TYPES[signature.x_dtype] if x_map(signature, config) else "x.dtype.element_ty",
        "gate_up": config["gate_up"],
        "parts": parts[config["gate_up"]],
        "fuses_activation": signature.activation != "none",
        "target": "partials" if signature.stage == "down" or parts_of_k(config) > 1 else "out",
        "tiles_n": tiles_n(signature, config),
        "steps": steps,
        "share": -(-steps // parts_of_k(config)),
        "joined": (("gate", ""), ("up", " + N")) if signature.halves == 2 else (("result", ""),),
        "experts_padded": power_of_two(signature.experts),
        "k_padded": power_of_two(signature.k),
        "x_groups_padded": power_of_two(max(1, signature.k // (precision.x_scales.group or signature.k)))
        if precision.x_scales
        else 0,
        "combine_columns": combine_columns(signature),
        "clamped_alpha": CLAMPED_ALPHA,
        "clamped_limit": CLAMPED_LIMIT,
    }


def work(
    signature: MoeGemmSignature,
    config: Config,
    arch: GpuArch,  # noqa: ARG001
    problem: MoeGemmProblem,
) -> tuple[LaunchWork, ...]:
    """What every launch has to do, for predictions."""
    return grouped_work(
        signature,
        stored(config),
        (config["block_m"], config["block_n"], config["block_k"]),
        problem,
        weights_first=config["operands"] == "weights_first",
        partial_dtype="fp32" if config["partials"] == "fp32" else signature.out_dtype,
        columns=combine_columns(signature),
        split_k=parts_of_k(config),
        resident=config.get("blocks_per_sm") or 0,
    )


def emulated_problems(signature: MoeGemmSignature, config: Config, arch: GpuArch) -> tuple[MoeGemmProblem, ...]:  # noqa: ARG001
    """Three tiles along k at least, two along n, an expert with two tiles of rows, one without any, ragged ends.

    Sizes leave the same remainders as the signature's, so that the source takes the same branches.
    """
    group = stored(config).group(signature.k)
    unit = math.lcm(config["block_k"], group if group < signature.k else 1)
    splits = parts_of_k(config)
    whole = -(-3 * splits * config["block_k"] // unit) * unit
    k = min(signature.k, whole + signature.k % unit)
    ragged = signature.n % config["block_n"]
    n = min(signature.n, config["block_n"] + ragged if ragged else 2 * config["block_n"])
    experts = min(signature.experts, 4)
    small = replace(signature, k=k, n=n, experts=experts, top_k=min(signature.top_k, 2, experts))
    rows = config["block_m"] + 3
    one_hot, few = RoutingSpec.parse("power-law:8"), RoutingSpec.parse("power-law")
    return (
        MoeGemmProblem(small, rows, one_hot, experts),
        MoeGemmProblem(small, 2, few, 2 * experts),
    )


def default_config(signature: MoeGemmSignature, arch: GpuArch, size: int | None) -> Choice:
    """The grouped template with vLLM's untuned tile for so many tokens."""
    return GROUPED, default_knobs(signature, arch, _MANY_TOKENS if size is None else size)


_LABEL = ("precision", "block_m", "block_n", "block_k", "num_warps", "num_stages")
_DTYPES = ("bf16", "fp16")

TEMPLATES = (
    Template(
        GROUPED,
        "triton",
        ("cuda", "hip"),
        grouped_space,
        layout,
        recipe,
        context,
        label=_LABEL,
        precisions=GPU_PRECISIONS,
        dtypes=_DTYPES,
        exclusion=exclusion,
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
    Template(
        SPLIT_K,
        "triton",
        ("cuda", "hip"),
        split_k_space,
        layout,
        recipe,
        context,
        applies=lambda signature, _arch: signature.k >= LEAST_SPLIT_K,
        label=(*_LABEL, "splits"),
        precisions=GPU_PRECISIONS,
        dtypes=_DTYPES,
        exclusion=exclusion,
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
    Template(
        PERSISTENT,
        "triton",
        ("cuda",),
        persistent_space,
        layout,
        recipe,
        context,
        applies=lambda signature, arch: "tma" in arch.capabilities and maps_fit(signature, find_precision("bf16")),
        label=(*_LABEL, "x_loads", "overlap", "blocks_per_sm"),
        precisions=GPU_PRECISIONS,
        dtypes=_DTYPES,
        exclusion=persistent_exclusion,
        entries=entries,
        emulated_problems=emulated_problems,
        work=work,
    ),
)

TRITON = Implementation(TEMPLATES, default_config, sizes=(1, 8, 32, 128, 512, 2048))
