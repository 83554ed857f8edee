"""Weights as GPU kernels read them: what the bytes say is what references are computed with."""

from __future__ import annotations

import numpy as np
import torch

from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.runtime.weights.row_packing import pack_rows, round_rows

EXPERTS, N, K = 2, 6, 96


def test_mxfp8_bytes_are_e4m3_times_powers_of_two() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((EXPERTS, N, K), dtype=np.float32) * np.float32(2.0) ** rng.integers(-8, 8, (1, N, 1))
    weight = weight.astype(np.float32)
    weight[0, 0, :32] = 0
    layout = RowLayout("mxfp8")
    packed = pack_rows(weight, layout)
    codes = torch.from_numpy(packed[: weight.size].copy()).view(torch.float8_e4m3fn).float().numpy()
    exponents = packed[layout.scale_offset(EXPERTS, N, K) :].reshape(EXPERTS, N, K // 32)
    scales = np.ldexp(1.0, exponents.astype(np.int32) - 127).repeat(32, axis=2)
    read = codes.reshape(weight.shape) * scales
    np.testing.assert_array_equal(read, round_rows(weight, find_precision("mxfp8"), "bf16"))
    # Three bits of mantissa; what lies above 448 times the scale is cut to it, an eighth at the most.
    peak = np.abs(weight).reshape(EXPERTS, N, K // 32, 32).max(axis=3).repeat(32, axis=2)
    assert (np.abs(read - weight) <= np.maximum(np.abs(weight) / 8, peak * 2.0**-9 / 256)).all()
    assert (read[0, 0, :32] == 0).all()
