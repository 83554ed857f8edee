"""Precisions that weights are stored in: elements of few bits, and the scales that they share.

On CPUs sums and activations stay fp32, unless a name ends in ``_a8``, so a precision says what is read from memory.
Elements lie in words of 32 bits, the same column's consecutive steps of k in one word, the first in the lowest bits: a
kernel takes them apart with shifts, on any instruction set. On GPUs they lie row by row (codegen/numbers/layouts.py,
``RowLayout``), weights are at most as exact as the signature's dtype, and some precisions round the activations, too,
so that both sides of the product go to the matrix unit as they are.

* ``bf16``: the upper half of an fp32, rounded to nearest even.
* ``int8``: ``scale * q``, q in [-127, 127], the scale being max |w| / 127.
* ``int8_a8``: the same, and every row of the activations becomes ``scale * q``, too, while the kernel runs: products
  and their sums are of integers, exact, and scaled at the end of a group of k. An arch has instructions for that, or
  has not (codegen/hardware/archs.py, ``CpuArch.dot``).
* ``int4``: ``scale * q + offset``, q in [-8, 7]: of four ranges between the least and the largest weight, the one with
  the least squared error. A scale alone cannot use all sixteen values and is off by 8.1 % where this is off by 7.5 %
  (normal weights, groups of 32).
* ``fp8_e4m3``: four bits of exponent, three of mantissa, no infinity (OCP 8-bit floating point, 2023), times a scale.
* ``fp4_e2m1``: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, times a power of two (``e8m0``) for 32 of them: mxfp4 of
  the OCP microscaling formats (2023). ``mxfp8`` of the same: ``fp8_e4m3`` elements with such scales, weights and
  activations alike. ``nvfp4`` has ``fp4_e2m1`` elements on both sides, an e4m3 scale for 16 of them, and an fp32 scale
  for all of an expert or a row of activations (codegen/numbers/nvfp4.py); ``nvfp4_a16`` leaves activations as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tilewright.errors import TilewrightError

WORD_BITS = 32
LOSSLESS = "fp32"
"""The precision of the weights as the op declares them."""

_FP8, _FP4 = "fp8_e4m3", "fp4_e2m1"
FP4_STEPS = 64
"""Of k, that an instruction takes where both operands are fp4."""
_ELEMENT_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8_e4m3": 8, "int4": 4, "fp4_e2m1": 4}
_LONGEST_INT32_SUM = (2**31 - 1) // 127**2
_GROUPS_PER_WORD = {"fp32": 1, "bf16_pair": 1, "e8m0": 4, "e4m3": 4}
"""Groups whose scales share a word: an fp32 scale, a bf16 scale (low half) and offset, four exponents or
numbers of 8 bits."""
_NIBBLE_RUN = 32
"""Steps of k whose elements of 4 bits lie in the same 16 bytes."""


@dataclass(frozen=True)
class ScaleSpec:
    """Scales of quantised weights or activations, along k."""

    dtype: str
    """``fp32``, ``bf16_pair`` (scale and offset), ``e8m0`` or ``e4m3``."""
    granularity: Literal["tensor", "channel", "group", "block"]
    """What shares a scale: the weights of an expert (all activations), a row, ``group`` steps of k of a row, or a
    square of ``group`` rows and steps."""
    group: int = 0
    """Steps of k that share a scale; 0: all of them."""
    outer: Literal["", "tensor", "channel"] = ""
    """What shares one of the fp32 scales by which these scales are multiplied in turn; empty: there are none."""

    @property
    def itemsize(self) -> int:
        """Bytes of a scale in memory, where scales do not share words."""
        return 4 // _GROUPS_PER_WORD[self.dtype]

    @property
    def per_word(self) -> int:
        """Groups whose scales share a word."""
        return _GROUPS_PER_WORD[self.dtype]


@dataclass(frozen=True)
class Precision:
    """How weights are stored: the type of their elements, and their scales."""

    name: str
    dtype: str
    scales: ScaleSpec | None = None
    x_dtype: str = ""
    """What activations are rounded to before the product; empty: they are taken as they come."""
    x_scales: ScaleSpec | None = None

    @property
    def bits(self) -> int:
        """Bits of an element, scales not counted."""
        return _ELEMENT_BITS[self.dtype]

    @property
    def steps(self) -> int:
        """Steps of k in a word."""
        return WORD_BITS // self.bits

    @property
    def quantised(self) -> bool:
        """Whether weights are rounded, and lie in words."""
        return self.name != LOSSLESS

    @property
    def scaled_by_matrix_unit(self) -> bool:
        """Whether elements of both sides go to the matrix unit together with their scales (``tl.dot_scaled``)."""
        return bool(self.x_dtype and self.scales and self.scales.dtype in ("e8m0", "e4m3"))

    @property
    def x_bits(self) -> int:
        """Bits of a rounded activation; 0 where they are taken as they come."""
        return _ELEMENT_BITS[self.x_dtype] if self.x_dtype else 0

    def mma_dtype(self, x_dtype: str) -> str:
        """Type of what the matrix unit gets (a key of ``GpuArch.mma``) for activations of ``x_dtype``."""
        return "nvfp4" if self.x_dtype == "fp4_e2m1" else self.x_dtype or x_dtype

    def group(self, k: int) -> int:
        """Steps of k that share a scale, of ``k`` in all."""
        return (self.scales.group if self.scales else 0) or k

    def groups(self, k: int) -> int:
        """Groups in ``k`` steps."""
        return k // self.group(k)

    def group_rows(self, k: int) -> int:
        """Rows of words that the elements of a group take."""
        return -(-self.group(k) // self.steps)

    def scale_rows(self, k: int) -> int:
        """Rows of words that all scales take."""
        return -(-self.groups(k) // self.scales.per_word) if self.scales else 0

    def rows(self, k: int) -> int:
        """Rows of words in a panel of ``k`` steps, scales included."""
        return self.groups(k) * self.group_rows(k) + self.scale_rows(k)

    def refusal(self, k: int) -> str | None:
        """Why weights with ``k`` steps cannot be stored so, in one sentence; None when they can."""
        if k % self.group(k):
            return f"k={k} is no multiple of the {self.group(k)} steps that share a scale in precision {self.name}"
        if self.x_dtype == _FP4 and k % FP4_STEPS:
            return f"k={k} is no multiple of the {FP4_STEPS} steps that a matrix instruction takes in {self.name}"
        if self.scales and self.scales.dtype == "e4m3" and k % _NIBBLE_RUN:
            return f"k={k} is no multiple of the {_NIBBLE_RUN} steps that share 16 bytes in precision {self.name}"
        if self.x_dtype == "int8" and self.group(k) > _LONGEST_INT32_SUM:
            return f"k={k} products of int8 do not fit the 32 bits of a sum in precision {self.name}"
        return None


def _groups(dtype: str, scale_dtype: str) -> list[Precision]:
    return [Precision(f"{dtype}g{g}", dtype, ScaleSpec(scale_dtype, "group", g)) for g in (128, 64, 32)]


_NVFP4_WEIGHTS = ScaleSpec("e4m3", "group", 16, outer="tensor")
_NVFP4_ACTIVATIONS = ScaleSpec("e4m3", "group", 16, outer="channel")

_CPU = (
    Precision(LOSSLESS, "fp32"),
    Precision("bf16", "bf16"),
    Precision("int8", "int8", ScaleSpec("fp32", "channel")),
    *_groups("int8", "fp32"),
    Precision("fp8_e4m3", "fp8_e4m3", ScaleSpec("fp32", "channel")),
    *_groups("int4", "bf16_pair"),
    Precision("mxfp4", "fp4_e2m1", ScaleSpec("e8m0", "group", 32)),
)
_INTEGER = tuple(
    replace(weights, name=f"{weights.name}_a8", x_dtype="int8", x_scales=ScaleSpec("fp32", "channel"))
    for weights in (Precision("int8", "int8", ScaleSpec("fp32", "channel")), *_groups("int8", "fp32"))
)
_GPU_ONLY = (
    Precision("fp16", "fp16"),
    Precision(
        "fp8_e4m3_block128",
        _FP8,
        ScaleSpec("fp32", "block", 128),
        x_dtype=_FP8,
        x_scales=ScaleSpec("fp32", "group", 128),
    ),
    Precision(
        "fp8_e4m3_token", _FP8, ScaleSpec("fp32", "channel"), x_dtype=_FP8, x_scales=ScaleSpec("fp32", "channel")
    ),
    Precision("fp8_e4m3_tensor", _FP8, ScaleSpec("fp32", "tensor"), x_dtype=_FP8, x_scales=ScaleSpec("fp32", "tensor")),
    Precision(
        "mxfp4_a8", "fp4_e2m1", ScaleSpec("e8m0", "group", 32), x_dtype=_FP8, x_scales=ScaleSpec("e8m0", "group", 32)
    ),
    Precision("mxfp8", _FP8, ScaleSpec("e8m0", "group", 32), x_dtype=_FP8, x_scales=ScaleSpec("e8m0", "group", 32)),
    Precision("nvfp4_a16", _FP4, _NVFP4_WEIGHTS),
    Precision("nvfp4", _FP4, _NVFP4_WEIGHTS, x_dtype=_FP4, x_scales=_NVFP4_ACTIVATIONS),
)

PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (*_CPU, *_INTEGER, *_GPU_ONLY)}
"""By name: those that CPU kernels know, the most exact first, then those that only GPU kernels do."""

CPU_PRECISIONS = tuple(precision.name for precision in _CPU)
INTEGER_PRECISIONS = tuple(precision.name for precision in _INTEGER)
"""Those whose products are of integers, on CPUs that have instructions for them."""
GPU_PRECISIONS = tuple(name for name in PRECISIONS if name not in (LOSSLESS, _FP8, *INTEGER_PRECISIONS))
"""Those that weights of GPU kernels are stored in; ``bf16`` and ``fp16`` are lossless for signatures of that dtype."""


def find_precision(name: str) -> Precision:
    """Precision by name.

    Raises:
        TilewrightError: for an unknown name.

    """
    if name not in PRECISIONS:
        raise TilewrightError(f"unknown precision {name!r}; known precisions: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def parse_precisions(text: str) -> tuple[str, ...]:
    """Names of precisions from ``fp32,int8,...``, each once.

    Raises:
        TilewrightError: for an unknown name, or none.

    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise TilewrightError(f"--precision {text!r} names no precision; known precisions: {', '.join(PRECISIONS)}")
    return tuple(dict.fromkeys(find_precision(name).name for name in names))


def storable(names: Sequence[str], k: int) -> tuple[str, ...]:
    """Those of ``names`` in which weights with ``k`` steps can be stored."""
    return tuple(name for name in names if find_precision(name).refusal(k) is None)
