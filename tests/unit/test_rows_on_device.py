"""Weights packed on their device: the bits of the numpy twin, and back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from posing import pose, posing, values

from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.numbers.precisions import GPU_PRECISIONS, find_precision
from tilewright.errors import TilewrightError
from tilewright.runtime.weights.laying_out import laid_out_weights, lay_out
from tilewright.runtime.weights.row_packing import pack_rows, round_rows
from tilewright.runtime.weights.rows_on_device import pack_rows_on_device, unpack_rows

EXPERTS, N, K = 3, 150, 256
SHAPE = (EXPERTS, N, K)


@pytest.fixture(autouse=True)
def _posing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with posing(monkeypatch):
        yield


def layout_of(name: str) -> RowLayout:
    """As the templates have it."""
    precision = find_precision(name)
    if precision.bits != 4:
        return RowLayout(name)
    return RowLayout(name, "pairs" if precision.x_dtype else "runs")


LAYOUTS = [layout_of(name) for name in GPU_PRECISIONS]
QUANTISED = [layout for layout in LAYOUTS if layout.stored.scales is not None]


def make_weight(seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, groups of zeros and of next to nothing, values halfway between elements."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(SHAPE, dtype=np.float32)
    weight *= (2.0 ** rng.integers(-30, 30, (EXPERTS, N, 1))).astype(np.float32)
    weight[0, 0, :128] = 0
    weight[0, 1, 3:9] = -0.0
    weight[1, 2] = np.float32(2.0**-120)
    weight[1, 3] = rng.integers(-12, 13, K).astype(np.float32) / 4
    weight[2, 4] = rng.integers(-17, 18, K).astype(np.float32) * 28
    weight[2, 5, 7] = np.float32(2.0**120)
    return torch.from_numpy(weight)


@pytest.mark.parametrize("is_posed", [False, True], ids=["cpu", "posed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.key)
def test_the_bits_are_those_of_the_numpy_twin(layout: RowLayout, is_posed: bool) -> None:
    weight = make_weight()
    if layout.precision == "fp16":
        weight = weight.clamp(-65000, 65000)
    expected = pack_rows(weight.numpy(), layout)
    packed = pack_rows_on_device(pose(weight, 1) if is_posed else weight, layout)
    assert packed.device.type == ("cuda" if is_posed else "cpu")
    found = values(packed).numpy()
    assert found.size % 16 == 0
    np.testing.assert_array_equal(found[: expected.size], expected)
    assert not found[expected.size :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.key)
def test_weights_of_a_model_are_packed_as_the_values_they_have(layout: RowLayout, dtype: torch.dtype) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = pack_rows(weight.float().numpy(), layout)
    np.testing.assert_array_equal(pack_rows_on_device(weight, layout).numpy()[: expected.size], expected)


@pytest.mark.parametrize("layout", QUANTISED, ids=lambda each: each.key)
def test_what_was_packed_is_read_back_as_kernels_compute_with_it(layout: RowLayout) -> None:
    weight = make_weight(1)
    packed = pack_rows_on_device(weight, layout)
    expected = round_rows(weight.numpy(), layout.stored, "fp32")
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(unpack_rows(packed, layout, SHAPE, expert).numpy(), expected[expert])


def test_many_experts_are_packed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, weight = layout_of("nvfp4"), make_weight(2)
    whole = pack_rows_on_device(weight, layout)
    monkeypatch.setattr("tilewright.runtime.weights.rows_on_device._AT_ONCE", 2 * N * K)
    assert torch.equal(pack_rows_on_device(weight, layout), whole)


def test_weights_in_their_own_dtype_are_not_copied() -> None:
    weight = torch.randn(SHAPE).bfloat16()
    laid_out = lay_out(weight, RowLayout("bf16"))
    assert (laid_out.data_ptr(), laid_out.dtype) == (weight.data_ptr(), torch.bfloat16)
    readable = laid_out_weights(laid_out, RowLayout("bf16"), SHAPE)
    assert torch.equal(readable.expert(2), weight[2])
    assert readable.expert(2).data_ptr() == weight[2].data_ptr()


def test_a_strided_weight_is_packed_by_its_values() -> None:
    weight = torch.randn(EXPERTS, K, N).transpose(1, 2)
    for layout in (RowLayout("bf16"), layout_of("int4g32")):
        expected = pack_rows(weight.numpy(), layout)
        np.testing.assert_array_equal(pack_rows_on_device(weight, layout).numpy()[: expected.size], expected)


def test_laid_out_weights_have_the_dtype_that_the_op_declares() -> None:
    weight, layout = torch.randn(SHAPE).half(), layout_of("int8g64")
    laid_out = lay_out(weight, layout)
    assert laid_out.dtype is torch.float16
    read = laid_out_weights(laid_out, layout, SHAPE).expert(1)
    assert read.dtype is torch.float16
    torch.testing.assert_close(read, weight[1], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 2.0**126])
def test_what_has_no_scale_is_refused(wrong: float) -> None:
    weight = torch.zeros(SHAPE)
    weight[1, 2, 3] = wrong
    with pytest.raises(TilewrightError, match=r"cannot be stored in mxfp4; leave that precision out"):
        pack_rows_on_device(weight, layout_of("mxfp4"))


def test_k_that_no_group_divides_is_refused() -> None:
    with pytest.raises(TilewrightError, match="k=40 is no multiple"):
        pack_rows_on_device(torch.zeros(1, 2, 40), layout_of("nvfp4"))
