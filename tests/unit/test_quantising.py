"""Weights in few bits: the C and numpy twins agree to the bit; what is read back is as near as the format allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from awkward import rounded
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.numbers.precisions import CPU_PRECISIONS, LOSSLESS, PRECISIONS
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.bind import pack_weight
from tilewright.runtime.calls.extension import native_module
from tilewright.runtime.process_memory import Memory
from tilewright.runtime.weights import packing
from tilewright.runtime.weights.experts import PackedWeights
from tilewright.runtime.weights.packing import pack_array, packed_dtype, packed_shape

QUANTISED = [PRECISIONS[name] for name in CPU_PRECISIONS if name != LOSSLESS]
LAYOUTS = [(8, 1, 0), (16, 2, 8), (8, 2, 8), (4, 1, 0)]

# Subnormals, zeros and exact ties are what rounding gets wrong.
floats = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-40, -1e-31, 2.0**-101, 2.0**125, -(2.0**125), 0.25, 0.75, 2.5, 127.5, 448.0]),
)


def weights_for(precision, rows: int, data) -> np.ndarray:
    k = data.draw(st.sampled_from([precision.group(1) * n if precision.group(1) > 1 else n for n in (1, 2, 3, 5)]))
    return data.draw(arrays(np.float32, (1, rows, k), elements=floats))


def packed(weight: np.ndarray, layout: WeightLayout, *, native: bool, monkeypatch) -> np.ndarray:
    out = np.full(packed_shape(layout, weight.shape), -1, packed_dtype(layout))
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(packing, "native_module", lambda: None)
        pack_array(weight, layout, out, threads=1)
    return out


@pytest.mark.skipif(native_module() is None, reason="the extension is not built")
@pytest.mark.parametrize("precision", QUANTISED, ids=lambda p: p.name)
@given(data=st.data())
def test_the_twins_give_the_same_bits(precision, data) -> None:
    columns, halves, run = data.draw(st.sampled_from(LAYOUTS))
    layout = WeightLayout(columns, halves, run, precision.name)
    weight = weights_for(precision, halves * data.draw(st.integers(1, 9)), data)
    with pytest.MonkeyPatch.context() as patch:
        ours = packed(weight, layout, native=True, monkeypatch=patch)
        twin = packed(weight, layout, native=False, monkeypatch=patch)
    np.testing.assert_array_equal(ours, twin)


@pytest.mark.parametrize("precision", QUANTISED, ids=lambda p: p.name)
def test_packed_weights_are_read_back_in_every_layout(precision) -> None:
    weight = torch.randn(2, 22, 256)
    expected = torch.from_numpy(rounded(weight.numpy(), precision))
    for columns, halves, run in LAYOUTS:
        layout = WeightLayout(columns, halves, run, precision.name)
        back = PackedWeights(pack_weight(weight, layout), layout, 22, 256)
        assert torch.equal(torch.stack([back.expert(0), back.expert(1)]), expected), layout


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("bf16", 0.001, 0.0018),
        ("int8", 0.006, 0.0085),
        ("int8g32", 0.004, 0.0056),
        ("fp8_e4m3", 0.02, 0.028),
        ("int4g128", 0.08, 0.096),
        ("int4g32", 0.06, 0.0765),
        ("mxfp4", 0.1, 0.12),
    ],
)
def test_the_error_of_normal_weights_is_that_of_the_format(name: str, low: float, high: float) -> None:
    weight = np.random.default_rng(0).standard_normal((1, 64, 1024), dtype=np.float32)
    error = np.linalg.norm(rounded(weight, PRECISIONS[name]) - weight) / np.linalg.norm(weight)
    assert low < error < high


@given(arrays(np.float32, (1, 1, 8), elements=st.floats(-4, 4, width=32)))
def test_bf16_rounds_as_torch(weight: np.ndarray) -> None:
    expected = torch.from_numpy(weight).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(rounded(weight, PRECISIONS["bf16"]), expected)


@given(arrays(np.float32, (1, 1, 7), elements=st.floats(-448, 448, width=32)))
def test_e4m3_rounds_as_torch(weight: np.ndarray) -> None:
    with_top = np.concatenate([weight, np.full((1, 1, 1), 448, np.float32)], axis=2)  # the scale is 1
    expected = torch.from_numpy(with_top).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(rounded(with_top, PRECISIONS["fp8_e4m3"]), expected)


def test_zeros_of_e4m3_have_no_sign() -> None:
    weight = np.array([[[448, -0.0, -1e-6, 0, -448, -(2.0**-11), 1, 2]]], np.float32)
    assert not np.signbit(rounded(weight, PRECISIONS["fp8_e4m3"])[weight > -1]).any()


@given(arrays(np.float32, (1, 1, 31), elements=st.floats(-6, 6, width=32)))
def test_mxfp4_takes_the_nearest_element(weight: np.ndarray) -> None:
    with_top = np.concatenate([weight, np.full((1, 1, 1), 6, np.float32)], axis=2)  # the scale is 1
    elements = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = np.abs(np.abs(with_top)[..., None] - elements).min(axis=-1)
    back = rounded(with_top, PRECISIONS["mxfp4"])
    assert set(np.abs(back).ravel()) <= set(elements)
    np.testing.assert_allclose(np.abs(back - with_top), nearest, atol=1e-6)


@given(arrays(np.float32, (1, 3, 40), elements=st.floats(-100, 100, width=32)))
def test_int8_is_off_by_half_a_step(weight: np.ndarray) -> None:
    step = np.abs(weight).max(axis=2, keepdims=True) / 127
    assert (np.abs(rounded(weight, PRECISIONS["int8"]) - weight) <= 0.5001 * step + 1e-30).all()


def test_int4_keeps_two_values_and_constants() -> None:
    weight = np.tile(np.array([0.5, -1.0], np.float32), 16).reshape(1, 1, 32)
    np.testing.assert_allclose(rounded(weight, PRECISIONS["int4g32"]), weight, rtol=2**-7)
    constant = np.full((1, 1, 32), 3.0, np.float32)
    np.testing.assert_array_equal(rounded(constant, PRECISIONS["int4g32"]), constant)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", QUANTISED, ids=lambda p: p.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**126])
def test_weights_without_a_scale_are_refused(precision, bad: float, native: bool, monkeypatch) -> None:
    weight = np.zeros((2, 5, 128), np.float32)
    weight[1, 3, 77] = bad
    with pytest.raises(TilewrightError, match="hold NaN, infinity or values beyond 2\\^126"):
        packed(weight, WeightLayout(8, precision=precision.name), native=native, monkeypatch=monkeypatch)


def test_what_is_not_quantised_may_hold_anything(monkeypatch) -> None:
    weight = np.full((1, 8, 4), np.nan, np.float32)
    assert np.isnan(packed(weight, WeightLayout(8), native=True, monkeypatch=monkeypatch)).all()


def test_strided_weights_are_quantised_like_contiguous_ones() -> None:
    weight = torch.randn(3, 64, 20).transpose(1, 2)
    layout = WeightLayout(8, precision="int4g32")
    assert torch.equal(pack_weight(weight, layout), pack_weight(weight.contiguous(), layout))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4g32", "fp8_e4m3", "mxfp4"])
def test_packing_takes_no_more_memory_than_what_it_makes(precision: str) -> None:
    """No copy of the whole weight on the way: the process's peak grows by the packed words, and little else."""
    weight = torch.randn(8, 512, 1024)  # 17 MB
    layout = WeightLayout(16, precision=precision)
    pack_weight(weight[:, :16], layout)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as error:
        pytest.skip(f"this system does not tell the peak of a process: {error}")
    before = Memory.now()
    packed = pack_weight(weight, layout)
    after = Memory.now()
    assert before.peak_bytes is not None
    assert after.peak_bytes is not None
    assert after.peak_bytes - before.peak_bytes <= packed.nbytes + weight.nbytes // 4
