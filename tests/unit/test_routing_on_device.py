"""Routing by torch where the tensors lie: what numpy's definition gives, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from posing import pose, posing, values
from waiting import NothingIsWaitedFor

from tilewright.codegen.routing import spec
from tilewright.errors import TilewrightError
from tilewright.runtime import softmax_topk, sort_tokens
from tilewright.runtime.serve.routing import device_routing
from tilewright.runtime.torch.routing import (
    pad_blocks_on_device,
    softmax_topk_on_device,
    sort_tokens_on_device,
)

drawn = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _posing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with posing(monkeypatch):
        yield


def buffers(tokens: int, top_k: int, experts: int) -> list[torch.Tensor]:
    return [
        pose(torch.full(shape, -7, dtype=torch.int32)) for shape in ((tokens * top_k,), (experts + 1,), (tokens, top_k))
    ]


@drawn
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 999), st.booleans())
def test_picks_are_sorted_as_numpy_defines_it(tokens: int, top_k: int, experts: int, seed: int, wide: bool) -> None:
    dtype = np.int64 if wide else np.int32
    ids = np.random.default_rng(seed).integers(-1, experts, (tokens, top_k), dtype=dtype)
    made = buffers(tokens, top_k, experts)
    with NothingIsWaitedFor():
        rows = sort_tokens_on_device(pose(torch.from_numpy(ids)), experts, *made)
    expected = spec.sort_tokens(ids, experts)
    row_token, expert_offsets, slot_row = (values(each).numpy() for each in made)
    assert rows == tokens * top_k
    np.testing.assert_array_equal(row_token[: len(expected.row_token)], expected.row_token)
    assert ((row_token >= 0) & (row_token < max(tokens, 1))).all()  # also behind the rows in use
    np.testing.assert_array_equal(expert_offsets, expected.expert_offsets)
    np.testing.assert_array_equal(slot_row, expected.slot_row)


def test_ids_out_of_range_get_no_row() -> None:
    made = buffers(2, 2, 3)
    sort_tokens_on_device(pose(torch.tensor([[0, 3], [-5, 1 << 20]])), 3, *made)
    assert values(made[1]).tolist() == [0, 1, 1, 1]
    assert values(made[2]).tolist() == [[0, -1], [-1, -1]]


@drawn
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(0, 999))
def test_rows_are_padded_to_blocks_as_numpy_defines_it(
    tokens: int, top_k: int, experts: int, block: int, seed: int
) -> None:
    ids = np.random.default_rng(seed).integers(0, experts, (tokens, top_k), dtype=np.int32)
    order = spec.sort_tokens(ids, experts)
    room = (-(-tokens * top_k // block) + experts) * block
    expected = spec.pad_blocks(order, block, room)
    out = [pose(torch.full((size,), -7, dtype=torch.int32)) for size in (room, room // block, 1)]
    held = [pose(torch.from_numpy(each)) for each in (ids, order.expert_offsets, order.slot_row)]
    with NothingIsWaitedFor():
        pad_blocks_on_device(*held, block, *out)
    np.testing.assert_array_equal(values(out[0]).numpy(), expected.sorted_slots)
    np.testing.assert_array_equal(values(out[1]).numpy(), expected.block_experts)
    assert values(out[2]).tolist() == [expected.padded_rows]


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_are_chosen_as_on_the_cpu(renormalize: bool) -> None:
    logits = torch.randint(-3, 4, (33, 24), generator=torch.Generator().manual_seed(0)).float()
    logits[0, :20] = -torch.inf
    ids, weights = softmax_topk(logits, 5, renormalize)
    out = pose(torch.empty(33, 5, dtype=torch.int32)), pose(torch.empty(33, 5))
    with NothingIsWaitedFor():
        softmax_topk_on_device(pose(logits), renormalize, *out)
    assert torch.equal(values(out[0]), ids)
    torch.testing.assert_close(values(out[1]), weights)


def test_public_functions_take_tensors_of_a_gpu() -> None:
    topk_ids = torch.tensor([[1, 0], [1, -1]])
    row_token, offsets, slot_row = sort_tokens(pose(topk_ids), 2)
    assert row_token.device.type == "cuda"
    assert row_token.numel() == 4
    assert values(offsets).tolist() == [0, 1, 3]
    assert values(slot_row).tolist() == [[1, 0], [2, -1]]
    logits = torch.randn(3, 4)
    for found, expected in zip(softmax_topk(pose(logits), 2, True), softmax_topk(logits, 2, True), strict=True):
        torch.testing.assert_close(values(found), expected)


def test_values_are_looked_at_where_that_is_asked_for() -> None:
    routing = device_routing(check_values=True)
    with pytest.raises(TilewrightError, match="token 1 picks expert 3 in slot 0"):
        routing.sort(pose(torch.tensor([[0], [3]])), 3, *buffers(2, 1, 3))
    out = pose(torch.empty(2, 1, dtype=torch.int32)), pose(torch.empty(2, 1))
    with pytest.raises(TilewrightError, match="token 1 has a largest router logit of nan"):
        routing.choose(pose(torch.tensor([[0.0, 1.0], [0.0, torch.nan]])), True, *out)


def test_ids_elsewhere_or_of_another_dtype_are_refused() -> None:
    routing = device_routing(check_values=False)
    with pytest.raises(TilewrightError, match="topk_ids is on cpu, and the experts on cuda:0"):
        routing.sort(torch.zeros(2, 1, dtype=torch.int32), 3, *buffers(2, 1, 3))
    with pytest.raises(TilewrightError, match=r"topk_ids has dtype torch.float32"):
        routing.sort(pose(torch.zeros(2, 1)), 3, *buffers(2, 1, 3))
