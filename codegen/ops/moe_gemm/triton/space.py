"""moe_gemm on GPUs: knobs of the Triton templates, and the rules that valid configs keep."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tilewright.codegen.backends.triton.pipelining import pipelining
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.numbers.precisions import FP4_STEPS, Precision, find_precision
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.space import Constraint, Parameter, Space, Value
from tilewright.errors import TilewrightError

GROUPED = "moe_gemm/triton_grouped"
SPLIT_K = "moe_gemm/triton_split_k"
PERSISTENT = "moe_gemm/triton_persistent"

LEAST_SPLIT_K = 512
"""Steps of k that are worth sharing: below, one program goes through them before a second launch has begun."""

MOST_SUMS_PER_THREAD = 128
"""fp32 sums of a tile that a thread may hold: half of its registers, so that operands and addresses fit beside them."""

_WIDE_LOAD_BYTES = 16

_MAP_UNIT_BYTES = 16
"""Of which the rows that a tensor map steps over have to be multiples."""

_BYTE = 8
_TCGEN05_ROWS = 128
_FEW_TOKENS = 64
"""Up to which vLLM's untuned tiles are narrow and long."""

_TILE = ("block_m", "block_n", "num_warps")
_ALL_TILES = (*_TILE, "block_k")


def stored(config: Mapping[str, Any]) -> Precision:
    """Precision of a config's weights."""
    return find_precision(config["precision"])


def tile_columns(signature: MoeGemmSignature, config: Mapping[str, Any]) -> int:
    """Weight rows of a tile: gate and up rows of the same outputs together."""
    return int(signature.halves * config["block_n"])


def x_bits(signature: MoeGemmSignature, precision: Precision) -> int:
    """Bits of an activation as the product takes it."""
    return precision.x_bits or _BYTE * ITEMSIZE[signature.x_dtype]


def decodes(precision: Precision) -> bool:
    """Whether elements and scales are multiplied before the product."""
    if precision.x_dtype or precision.scales is None:
        return False
    return precision.scales.granularity == "group"


def shared_memory_bytes(signature: MoeGemmSignature, config: Mapping[str, Any], arch: GpuArch) -> int:
    """Of the tiles in flight; what is decoded goes there once more as the matrix unit takes it."""
    precision = stored(config)
    buffers = pipelining(arch).buffers(config["num_stages"])
    x_tile = config["block_m"] * config["block_k"] * x_bits(signature, precision) // _BYTE
    elements = tile_columns(signature, config) * config["block_k"]
    total = buffers * (x_tile + elements * precision.bits // 8)
    if decodes(precision) or precision.dtype == "int8":
        total += elements * ITEMSIZE[signature.x_dtype]
    return int(total)


def common_parameters(signature: MoeGemmSignature, arch: GpuArch, precisions: tuple[str, ...]) -> tuple[Parameter, ...]:
    """Knobs that every template has.

    Raises:
        TilewrightError: for a precision whose groups do not divide k.

    """
    for name in precisions:
        if refusal := find_precision(name).refusal(signature.k):
            raise TilewrightError(f"{signature.describe()}: {refusal}")
    gate_up = ("two_dots", "interleaved") if signature.halves == 2 else ("none",)
    partials = ("fp32", "rounded") if signature.stage == "down" else ("none",)
    return (
        Parameter("precision", precisions, "how weights are stored: a part of the weight layout"),
        Parameter("block_m", (16, 32, 64, 128), "rows of a tile"),
        Parameter("block_n", (32, 64, 128, 256), "output columns of a tile"),
        Parameter("block_k", (32, 64, 128, 256), "steps of k of an iteration"),
        Parameter("group_m", (1, 8, 16), "tiles in m that are gone through before the next in n"),
        Parameter("num_warps", (4, 8), "warps of a program"),
        Parameter("num_stages", pipelining(arch).stages(2, 3, 4, 5), "tiles in flight"),
        Parameter(
            "operands",
            ("rows_first", "weights_first"),
            "whose rows are the rows of the matrix unit's tile: few rows leave most of it idle unless weights are",
        ),
        Parameter("gate_up", gate_up, "gate and up columns in two products, or side by side in one"),
        Parameter("partials", partials, "rows are added up from fp32, or from values of the output's dtype"),
    )


def common_constraints(signature: MoeGemmSignature, arch: GpuArch) -> tuple[Constraint, ...]:
    """Rules that every template keeps."""
    k = signature.k

    def sums_per_thread(c: Mapping[str, Any]) -> float:
        return float(c["block_m"] * tile_columns(signature, c) / (c["num_warps"] * arch.warp_size))

    def sums_fit(c: Mapping[str, Any]) -> bool:
        scales = stored(c).scales
        twice = 2 if scales is not None and scales.granularity == "block" else 1
        return 4 <= twice * sums_per_thread(c) <= MOST_SUMS_PER_THREAD

    def scales_fit(c: Mapping[str, Any]) -> bool:
        group = stored(c).group(k)
        if group == k:
            return True
        whole = c["block_k"] % group == 0 or group % c["block_k"] == 0
        scales = stored(c).scales
        if scales is not None and scales.granularity == "block":
            return bool(whole and c["block_k"] <= group and k % c["block_k"] == 0)
        return bool(whole and not (stored(c).x_dtype and k % c["block_k"]))

    def scales_multiplied(c: Mapping[str, Any]) -> bool:
        if not stored(c).scaled_by_matrix_unit:
            return True
        columns = c["block_n"] * (2 if c["gate_up"] == "interleaved" else 1)
        rows = columns if c["operands"] == "weights_first" else c["block_m"]
        enough_rows = rows >= _TCGEN05_ROWS or "tcgen05" not in arch.capabilities
        return bool(enough_rows and (stored(c).x_bits == _BYTE or c["block_k"] >= FP4_STEPS))

    def wide_loads(c: Mapping[str, Any]) -> bool:
        rows = c["block_n"] * (2 if c["gate_up"] == "interleaved" else 1)
        row_bytes = c["block_k"] * stored(c).bits // 8
        threads = c["num_warps"] * arch.warp_size
        return bool(row_bytes >= _WIDE_LOAD_BYTES and rows * row_bytes >= _WIDE_LOAD_BYTES * threads)

    return (
        Constraint(
            "registers", sums_fit, "sums of a tile fit the registers, and keep every thread busy", (*_TILE, "precision")
        ),
        Constraint(
            "scales", scales_fit, "an iteration holds whole groups of k, or a part of one", ("precision", "block_k")
        ),
        Constraint(
            "matrix_scales",
            scales_multiplied,
            "the matrix unit multiplies scales: sm_100 for 128 rows (Triton 3.7 takes fewer apart in software, and "
            "fails with fp4 activations), and fp4 for 64 steps of k",
            ("precision", "block_m", "block_n", "block_k", "operands", "gate_up"),
        ),
        Constraint(
            "wide_loads",
            wide_loads,
            "every thread reads 16 bytes of weights at a time",
            ("precision", "block_n", "block_k", "num_warps", "gate_up"),
        ),
        Constraint(
            "shared_memory",
            lambda c: shared_memory_bytes(signature, c, arch) <= arch.smem_bytes_per_block,
            "tiles in flight fit the shared memory of a block",
            ("precision", *_ALL_TILES, "num_stages"),
        ),
        Constraint(
            "k_tile",
            lambda c: c["block_k"] <= 64 or c["block_k"] < 2 * k,
            "an iteration is not mostly padding",
            ("block_k",),
        ),
        Constraint(
            "n_tile",
            lambda c: c["block_n"] <= 64 or c["block_n"] < 2 * signature.n,
            "a tile is not mostly padding",
            ("block_n",),
        ),
    )


def exclusion(precision: str, arch: GpuArch) -> str | None:
    """Why weights cannot be read in ``precision`` on ``arch``, in words; None where they can."""
    taken = find_precision(precision)
    if taken.x_dtype and "fp8_mma" not in arch.capabilities:
        return f'the compiler says of {arch.name} "type fp8e4nv not supported in this architecture"'
    if taken.scaled_by_matrix_unit and "dot_scaled" not in arch.capabilities:
        return f"Triton has no matrix instruction for {arch.name} that takes block scales"
    if taken.mma_dtype("") == "nvfp4" and "nvfp4" not in arch.mma:
        return f"Triton has no matrix instruction for {arch.name} that takes e4m3 scales of 16 steps"
    return None


@lru_cache(maxsize=64)
def grouped_space(signature: MoeGemmSignature, arch: GpuArch, precisions: tuple[str, ...]) -> Space:
    """One tile per program."""
    return Space.enumerate(common_parameters(signature, arch, precisions), common_constraints(signature, arch))


@lru_cache(maxsize=64)
def split_k_space(signature: MoeGemmSignature, arch: GpuArch, precisions: tuple[str, ...]) -> Space:
    """Few rows to a tile, whose sum several programs share; they leave fp32 parts."""
    own = {
        "block_m": Parameter("block_m", (16, 32, 64), "rows of a tile"),
        "partials": Parameter("partials", ("fp32",), "what parts are added up from"),
    }
    parameters = (
        *(own.get(each.name, each) for each in common_parameters(signature, arch, precisions)),
        Parameter("splits", (2, 4, 8, 16), "programs that share the sum of a tile"),
    )
    worth = Constraint(
        "share",
        lambda c: bool(c["splits"] * c["block_k"] <= signature.k),
        "every program has a step of k",
        ("block_k", "splits"),
    )
    return Space.enumerate(parameters, (*common_constraints(signature, arch), worth))


def persistent_exclusion(precision: str, arch: GpuArch) -> str | None:
    """The same for the persistent template, whose weights are copied by tensor maps."""
    if "tma" not in arch.capabilities:
        return f"{arch.name} has no instruction that copies tiles by a tensor map"
    taken = find_precision(precision)
    if taken.bits < _BYTE <= taken.x_bits:
        return "tensor descriptors of padded fp4 elements are not launched"
    return exclusion(precision, arch)


def maps_fit(signature: MoeGemmSignature, precision: Precision) -> bool:
    """Whether rows of weights and activations are multiples of what tensor maps step over."""
    bits = (precision.bits, x_bits(signature, precision))
    return all(signature.k * each % (_BYTE * _MAP_UNIT_BYTES) == 0 for each in bits)


@lru_cache(maxsize=64)
def persistent_space(signature: MoeGemmSignature, arch: GpuArch, precisions: tuple[str, ...]) -> Space:
    """As many programs as the device holds; the grid is no more a matter of tiles."""
    gathers = signature.stage == "up"
    x_loads = ("pointers", "tensor_map") if not gathers or "tma_gather" in arch.capabilities else ("pointers",)
    # On sm_90 Triton 3.7 ignores warp_specialize with 8 warps and aborts in TaskIdPropagation.cpp with 4.
    specializes = "warp_specialize" in arch.capabilities and "wgmma" not in arch.capabilities
    own = {
        "block_n": Parameter("block_n", (64, 128, 256), "output columns of a tile"),
        "block_k": Parameter("block_k", (32, 64, 128), "steps of k of an iteration"),
        "group_m": Parameter("group_m", (1, 8), "tiles in m that are gone through before the next in n"),
        "num_stages": Parameter("num_stages", (2, 3, 4), "tiles in flight"),
        "gate_up": Parameter("gate_up", ("two_dots",) if signature.halves == 2 else ("none",), "as two products"),
    }
    parameters = (
        *(own.get(each.name, each) for each in common_parameters(signature, arch, precisions)),
        Parameter("x_loads", x_loads, "how rows of x come: pointers, or a tensor map (rows of tokens: gathered by it)"),
        Parameter(
            "overlap",
            ("none", "flatten", "warp_specialize") if specializes else ("none", "flatten"),
            "what runs beside products: nothing, the loads of the next tile, or loads by warps of their own",
        ),
        Parameter("blocks_per_sm", (1, 2), "programs for a multiprocessor"),
    )

    def fits_maps(c: Mapping[str, Any]) -> bool:
        runs = stored(c).bits < _BYTE and not stored(c).x_dtype  # x is read in two halves, which no map holds
        return maps_fit(signature, stored(c)) and not (runs and c["x_loads"] == "tensor_map")

    common = [each for each in common_constraints(signature, arch) if each.name != "wide_loads"]
    maps = Constraint(
        "tensor_maps", fits_maps, "rows are multiples of 16 bytes, and come whole", ("precision", "x_loads")
    )
    return Space.enumerate(parameters, (*common, maps))


def default_knobs(signature: MoeGemmSignature, arch: GpuArch, tokens: int) -> dict[str, Value]:
    """What vLLM's fused_moe takes where nobody tuned: ``get_default_config`` since its pull request 34846 (2026).

    Small batches get few rows and long steps of k, large ones more warps. Its columns are those of gate and up
    together, and tiles no larger than the problem are kept within it.
    """
    block_m = next((rows for most, rows in ((32, 16), (96, 32), (512, 64)) if tokens <= most), 128)
    few = tokens <= _FEW_TOKENS
    block_n, block_k = (64 if few else 128) // signature.halves, 128 if few else 64
    while block_n > 64 and block_n >= 2 * signature.n:
        block_n //= 2
    while block_k > 64 and block_k >= 2 * signature.k:
        block_k //= 2
    return {
        "precision": signature.w_dtype,
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "group_m": 16 if tokens // signature.experts > 128 else 1,
        "num_warps": 4 if tokens <= 128 else 8,
        "num_stages": (4 if tokens <= 32 else 3) if pipelining(arch).deep else 2,
        "operands": "rows_first",
        "gate_up": "two_dots" if signature.halves == 2 else "none",
        "partials": "rounded" if signature.stage == "down" else "none",
    }
