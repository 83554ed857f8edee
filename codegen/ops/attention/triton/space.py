"""attention on GPUs: knobs of the Triton templates, and the rules that valid configs keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tilewright.codegen.backends.triton.pipelining import pipelining
from tilewright.codegen.hardware.archs import GpuArch
from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.implementation import Choice
from tilewright.codegen.space import Constraint, Parameter, Space, Value
from tilewright.errors import TilewrightError

DECODE = "attention/triton_decode"
MLA_DECODE = "attention/triton_mla_decode"
PREFILL = "attention/triton_prefill"

_USUAL_WARP = 32
_LEAST_SIDE = 16
"""Of an operand of a matrix product."""
_MOST_ROWS = 128
_MOST_PACKED = 16
_MOST_SUMS_PER_THREAD = 192
"""fp32 sums and scores that a thread may hold, so that operands and addresses fit beside them."""
_WIDE_LOAD_BYTES = 16
_LEAST_GROUP_ROWS = 64
"""Of a tile that the matrix instructions of a group of warps take."""
_GROUP_WARPS = 4
_MOST_STEPS_PER_QUERY = 32
"""Tokens of a tile to a query of it: below, most of a masked tile is thrown away."""


@dataclass(frozen=True)
class DimPart:
    """A run of a head dim that one matrix product goes through."""

    first: int
    width: int
    """A power of two, at least 16; what lies beyond the head dim is masked."""


def dim_parts(dim: int) -> tuple[DimPart, ...]:
    """``dim`` as few powers of two: 80 is 64 and 16, 192 is 128 and 64."""
    parts, first = [], 0
    while first < dim:
        left = dim - first
        width = max(_LEAST_SIDE, 1 << (left.bit_length() - 1))
        parts.append(DimPart(first, width))
        first += width
    return tuple(parts)


def key_parts(signature: AttentionSignature) -> tuple[DimPart, ...]:
    """Parts of a key. Those of a latent row begin with the parts of its value, so that both products share them."""
    if not signature.latent:
        return dim_parts(signature.head_dim)
    latent = signature.value_dim
    positions = dim_parts(signature.head_dim - latent)
    return (*dim_parts(latent), *(DimPart(latent + part.first, part.width) for part in positions))


def padded(parts: Sequence[DimPart]) -> int:
    """Elements that parts have together."""
    return sum(part.width for part in parts)


def _cached_elements(signature: AttentionSignature) -> int:
    """Elements of a token that a tile holds, padding included."""
    keys = padded(key_parts(signature))
    return keys if signature.latent else keys + padded(dim_parts(signature.value_dim))


def power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _shared_memory_bytes(signature: AttentionSignature, rows: int, c: Mapping[str, Any], arch: GpuArch) -> int:
    """Of tokens in flight, of the queries, and of the weights on their way to the second product."""
    pipeline = pipelining(arch)
    dims = _cached_elements(signature)
    itemsize = ITEMSIZE[signature.q_dtype]
    tokens = pipeline.buffers(c["num_stages"]) * c["block_kv"] * dims * ITEMSIZE[signature.kv_dtype]
    if signature.kv_dtype != signature.q_dtype:
        tokens += c["block_kv"] * dims * itemsize
    if not pipeline.deep:  # queries and weights stay in registers
        return int(tokens)
    return int(tokens + rows * (padded(key_parts(signature)) + c["block_kv"]) * itemsize)


def _latent_shared_memory_bytes(signature: AttentionSignature, rows: int, c: Mapping[str, Any], arch: GpuArch) -> int:
    """The same of latent rows, which both products read, as Triton 3.7 buffers them.

    Pages are loaded before the rows that they name, so that a row is ahead by half of the stages. Matrix units that
    read shared memory by themselves (wgmma, tcgen05; tiles of 64 rows) keep a tile longer; Triton lets tcgen05's
    products of three iterations overlap, the last of which still needs the latent part. Without stages, threads that
    multiply (mma) hold a tile twice, in the order of either product.
    """
    dims, latent, itemsize = _cached_elements(signature), signature.value_dim, ITEMSIZE[signature.q_dtype]
    token_bytes, latent_bytes = dims * ITEMSIZE[signature.kv_dtype], latent * ITEMSIZE[signature.kv_dtype]
    widened = dims * itemsize if signature.kv_dtype != signature.q_dtype else 0
    if not pipelining(arch).deep:  # queries pass through before there are tokens
        return int(max(c["block_kv"] * (token_bytes + widened), rows * latent * itemsize))
    first = rows if c["operands"] == "queries_first" else c["block_kv"]
    reads_shared = first >= _LEAST_GROUP_ROWS and c["num_warps"] >= _GROUP_WARPS
    ahead = max(1, (c["num_stages"] - 1) // 2)
    if c["num_stages"] == 1:
        kept = token_bytes if reads_shared or c["operands"] == "keys_first" else 2 * latent_bytes
    elif reads_shared and "tcgen05" in arch.capabilities:
        kept = (ahead + 1) * token_bytes + 2 * latent_bytes
    elif reads_shared and "wgmma" in arch.capabilities:
        kept = (ahead + 1) * token_bytes
    else:
        kept = ahead * token_bytes
    return int(c["block_kv"] * (kept + widened) + rows * (dims + c["block_kv"]) * itemsize)


def _constraints(signature: AttentionSignature, arch: GpuArch, rows: str) -> tuple[Constraint, ...]:
    """Rules of all templates; ``rows`` is the knob that holds the rows of a tile."""

    def fits_registers(c: Mapping[str, Any]) -> bool:
        held = c[rows] * (padded(dim_parts(signature.value_dim)) + c["block_kv"])
        return bool(held <= _MOST_SUMS_PER_THREAD * c["num_warps"] * arch.warp_size)

    def loads_wide(c: Mapping[str, Any]) -> bool:
        threads = c["num_warps"] * arch.warp_size
        widths = [part.width for part in key_parts(signature)]
        # What a head dim leaves over is little; positions are a part of a latent row that is to be read well, too (not
        # by AMD's wavefronts, which are so wide that little else would be left).
        width = min(widths) if signature.latent and arch.warp_size <= _USUAL_WARP else max(widths)
        tile_bytes = c["block_kv"] * width * ITEMSIZE[signature.kv_dtype]
        # One warp always may: nothing else can load a tile of small heads.
        return bool(c["num_warps"] == 1 or tile_bytes >= _WIDE_LOAD_BYTES * threads)

    shared_memory_bytes = _latent_shared_memory_bytes if signature.latent else _shared_memory_bytes
    return (
        Constraint(
            "registers", fits_registers, "sums and scores of a tile fit the registers", (rows, "block_kv", "num_warps")
        ),
        Constraint(
            "wide_loads", loads_wide, "every thread reads 16 bytes of keys at a time", ("block_kv", "num_warps")
        ),
        Constraint(
            "shared_memory",
            lambda c: shared_memory_bytes(signature, c[rows], c, arch) <= arch.smem_bytes_per_block,
            "tokens in flight fit the shared memory of a block",
            (rows, "block_kv", "num_stages", *(("operands", "num_warps") if signature.latent else ())),
        ),
    )


def _stages(arch: GpuArch, *deep: int) -> Parameter:
    return Parameter("num_stages", pipelining(arch).stages(*(deep or (1, 2, 3, 4))), "tiles of tokens in flight")


@lru_cache(maxsize=64)
def decode_space(signature: AttentionSignature, arch: GpuArch) -> Space:
    """Tiles, and how many programs share a sequence."""
    rows = power_of_two(signature.group)
    parameters = (
        Parameter(
            "block_rows",
            tuple(r for r in (16, 32, 64, _MOST_ROWS) if r == _LEAST_SIDE or r <= rows),
            "query heads of a tile, which read keys and values together",
        ),
        Parameter("block_kv", (16, 32, 64, 128, 256), "tokens of a tile"),
        Parameter("splits", (1, 2, 4, 8, 16, 32, 64), "programs that share a sequence"),
        Parameter(
            "operands",
            ("queries_first", "keys_first"),
            "whose rows are the rows of the matrix unit's tile: few queries leave most of it idle unless keys are",
        ),
        Parameter("num_warps", (1, 2, 4, 8), "warps of a program"),
        # Of long rows few tiles fit, and the first of even numbers of stages adds nothing to the odd one before it.
        _stages(arch, 1, 2, 3, 5) if signature.latent else _stages(arch),
    )
    return Space.enumerate(parameters, _constraints(signature, arch, "block_rows"))


@lru_cache(maxsize=64)
def prefill_space(signature: AttentionSignature, arch: GpuArch) -> Space:
    """Tiles of queries and of tokens, and the order of programs."""
    group = power_of_two(signature.group)
    parameters = (
        Parameter("block_m", (16, 32, 64, 128), "rows of a tile: queries times packed heads"),
        Parameter(
            "packed",
            tuple(p for p in (1, 2, 4, 8, _MOST_PACKED) if p <= group),
            "query heads of a tile, which share keys and values",
        ),
        Parameter("block_kv", (16, 32, 64, 128), "tokens of a tile"),
        Parameter("masks", ("all", "ends"), "scores are masked in all tiles, or where some row sees a part only"),
        Parameter("schedule", ("by_head", "longest_first"), "programs of a head are neighbours, or of late queries"),
        Parameter("num_warps", (1, 2, 4, 8), "warps of a program"),
        _stages(arch),
    )
    own = Constraint(
        "queries",
        lambda c: bool(c["block_kv"] <= _MOST_STEPS_PER_QUERY * (c["block_m"] // c["packed"])),
        "a tile has queries enough for its tokens",
        ("block_m", "packed", "block_kv"),
    )
    return Space.enumerate(parameters, (own, *_constraints(signature, arch, "block_m")))


def default_config(signature: AttentionSignature, arch: GpuArch, size: int | None) -> Choice:  # noqa: ARG001
    """What vLLM's unified attention takes: 16 rows (or the group), 16 tokens to decode in 16 parts, 32 to prefill.

    To decode latent rows, what its Triton MLA takes: 16 rows, 32 tokens (AMD: 16) in 4 parts, 4 warps, 2 stages (AMD:
    1). Where it would not fit, or not load 16 bytes a thread: fewer tiles in flight, then fewer warps, then larger
    tiles. Sources: ``vllm/v1/attention/ops/triton_unified_attention.py`` (``_get_tile_size``, ``BLOCK_M``), 2025;
    ``triton_decode_attention.py`` beside it (``_decode_grouped_att_m_fwd``) and
    ``vllm/v1/attention/backends/mla/triton_mla.py`` (``num_kv_splits``), 2026.

    Raises:
        TilewrightError: when no such config is valid.

    """
    rows = max(_LEAST_SIDE, power_of_two(signature.group))
    deep = pipelining(arch).deep
    stages: tuple[int, ...] = (3, 2, 1) if deep else (2, 1)
    if signature.latent:
        space, name, least_kv = decode_space(signature, arch), MLA_DECODE, 32 if deep else 16
        stages = (2, 1) if deep else (1,)
        knobs: dict[str, Value] = {"block_rows": _LEAST_SIDE, "splits": 4, "operands": "queries_first"}
    elif signature.stage == "decode":
        space, name, least_kv = decode_space(signature, arch), DECODE, 16
        knobs = {"block_rows": min(rows, _MOST_ROWS), "splits": 16, "operands": "queries_first"}
    else:
        space, name, least_kv = prefill_space(signature, arch), PREFILL, 32
        packed = min(power_of_two(signature.group), _MOST_PACKED)
        knobs = {"block_m": min(rows, _MOST_ROWS), "packed": packed, "masks": "all", "schedule": "by_head"}
    for own in _tiles(least_kv, stages):
        if space.find({**knobs, **own}) is not None:
            return name, {**knobs, **own}
    raise TilewrightError(
        f"{signature.describe()} has no valid default config for {arch.name}; its heads are too large"
    )


def _tiles(least_kv: int, stages: Sequence[int]) -> Sequence[dict[str, Value]]:
    return [
        {"block_kv": block_kv, "num_warps": num_warps, "num_stages": num_stages}
        for block_kv in (least_kv, 2 * least_kv, 4 * least_kv, 16)
        for num_warps in (4, 2, 8, 1)
        for num_stages in stages
    ]
