"""nvfp4: e2m1 elements, an e4m3 scale for 16 of them, and an fp32 scale for those scales.

After "Introducing NVFP4 for efficient and accurate low-precision inference" (NVIDIA, 2025). The fp32 scale makes the
largest group's scale 448, so that e4m3 can hold the others. What it serves is one expert's weights, so that experts can
be packed one by one, or one row of activations, so that no token's bits depend on what else is in its batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.numbers.dtypes import E2M1_LARGEST, E4M3_LARGEST, round_to

NVFP4_GROUP = 16

_Floats = NDArray[np.float32]

_TINY = np.float32(2.0**-100)
"""What holds nothing larger becomes zeros."""
_INVERSE_LARGEST = np.float32(1 / (float(E2M1_LARGEST) * float(E4M3_LARGEST)))


def nvfp4_parts(values: _Floats) -> tuple[_Floats, _Floats, _Floats]:
    """Elements [parts, groups, 16], scales [parts, groups] and outer scales [parts] of ``values`` like the elements.

    Elements are numbers of e2m1, scales of e4m3; each value is about the product of the three. Every step is the fp32
    operation that kernels do (``shared/triton_quantise``), in the same order.
    """
    peaks = np.abs(values).max(axis=2)
    peak = peaks.max(axis=1)
    outer = np.where(peak >= _TINY, peak, np.float32(1)) * _INVERSE_LARGEST
    scales = round_to(peaks / (outer * E2M1_LARGEST)[:, None], "fp8_e4m3")
    steps = scales * outer[:, None]
    inverse = np.where(steps > 0, np.float32(1) / np.where(steps > 0, steps, np.float32(1)), np.float32(0))
    return round_to(values * inverse[:, :, None], "fp4_e2m1"), scales, outer
