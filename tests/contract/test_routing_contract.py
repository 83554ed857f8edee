"""Routing in the runtime: one suite, inherited by the extension and by its Python twin."""

import numpy as np
import pytest
import torch
from call_layers import CallContract, Native, Pure, own_settings
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.routing.spec import sort_tokens as numpy_sort_tokens
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.bind import softmax_topk, sort_tokens, sort_tokens_into
from tilewright.runtime.serve.routing import softmax_topk_into


class RoutingTests(CallContract):
    @own_settings
    @given(
        tokens=st.integers(0, 40),
        top_k=st.integers(1, 8),
        experts=st.integers(1, 70),
        elsewhere=st.booleans(),
        dtype=st.sampled_from([torch.int32, torch.int64]),
        strided=st.booleans(),
        seed=st.integers(0, 999),
    )
    def test_tokens_are_sorted_as_declared(self, tokens, top_k, experts, elsewhere, dtype, strided, seed):
        generator = torch.Generator().manual_seed(seed)
        width = top_k * (2 if strided else 1)
        ids = torch.randint(-1 if elsewhere else 0, experts, (tokens, width), generator=generator, dtype=dtype)
        ids = ids[:, ::2] if strided else ids
        order = numpy_sort_tokens(ids.numpy(), experts)
        for mine, theirs in zip(
            sort_tokens(ids, experts), (order.row_token, order.expert_offsets, order.slot_row), strict=True
        ):
            assert mine.dtype is torch.int32
            np.testing.assert_array_equal(mine.numpy(), theirs)

    def test_buffers_are_reused(self):
        ids = torch.tensor([[1, 0], [-1, 1]])
        row_token = torch.full((9,), 77, dtype=torch.int32)
        offsets, slot_row = torch.empty(3, dtype=torch.int32), torch.empty((2, 2), dtype=torch.int32)
        assert sort_tokens_into(ids, 2, row_token, offsets, slot_row) == 3
        assert row_token.tolist() == [0, 0, 1] + [77] * 6
        assert offsets.tolist() == [0, 1, 3]
        assert slot_row.tolist() == [[1, 0], [-1, 2]]

    @pytest.mark.parametrize("bad", [2, -2, 2**31 - 1])
    def test_an_id_out_of_range_is_named(self, bad):
        ids = torch.zeros(3, 2, dtype=torch.int32)
        ids[2, 1] = bad
        with pytest.raises(TilewrightError, match=f"token 2 picks expert {bad} in slot 1"):
            sort_tokens(ids, 2)

    @pytest.mark.parametrize(
        ("ids", "experts", "said"),
        [
            (torch.zeros(3, 2), 2, "topk_ids has dtype torch.float32"),
            (torch.zeros(3, dtype=torch.int32), 2, "topk_ids is torch.int32"),
            ([[0]], 2, "topk_ids is a list"),
            (torch.zeros(3, 2, dtype=torch.int32), 0, "there must be at least 1"),
        ],
    )
    def test_ids_of_another_kind_are_refused(self, ids, experts, said):
        with pytest.raises(TilewrightError) as caught:
            sort_tokens(ids, experts)
        assert said in str(caught.value)

    @pytest.mark.parametrize("name", ["row_token", "expert_offsets", "slot_row"])
    def test_a_buffer_that_does_not_fit_is_named(self, name):
        shapes = {"row_token": (6,), "expert_offsets": (5,), "slot_row": (3, 2)}
        buffers = {key: torch.empty(shape, dtype=torch.int32) for key, shape in shapes.items()}
        buffers[name] = buffers[name][:-1]
        with pytest.raises(TilewrightError, match=f"{name} is torch.int32 .*; expected a contiguous buffer"):
            sort_tokens_into(torch.zeros(3, 2, dtype=torch.int32), 4, **buffers)

    @own_settings
    @given(
        tokens=st.integers(0, 30),
        experts=st.integers(1, 140),
        top_k=st.integers(1, 9),
        renormalize=st.booleans(),
        spread=st.sampled_from([0.0, 1.0, 40.0]),
        masked=st.booleans(),
        seed=st.integers(0, 999),
    )
    def test_the_most_probable_experts_are_chosen(self, tokens, experts, top_k, renormalize, spread, masked, seed):
        top_k = min(top_k, experts)
        generator = torch.Generator().manual_seed(seed)
        # Rounded, so that equal logits occur.
        logits = (torch.randn(tokens, experts, generator=generator) * spread).round(decimals=1)
        if masked:
            logits[:, 1::2] = float("-inf")
        ids, weights = softmax_topk(logits, top_k, renormalize)
        by_hand = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        assert torch.equal(ids.long(), by_hand)
        shares = torch.softmax(logits.double(), dim=1).gather(1, by_hand)
        if renormalize:
            shares = shares / shares.sum(dim=1, keepdim=True)
        torch.testing.assert_close(weights.double(), shares, rtol=2e-6, atol=1e-12)

    def test_strided_logits_are_taken(self):
        logits = torch.randn(4, 12)[:, ::2]
        expected_weights, expected_ids = torch.softmax(logits, 1).topk(2)
        ids, weights = softmax_topk(logits, 2, renormalize=False)
        assert torch.equal(ids.long(), expected_ids)
        torch.testing.assert_close(weights, expected_weights)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
    @pytest.mark.parametrize("column", [0, 3, 6])
    def test_logits_without_a_softmax_are_named(self, bad, column):
        logits = torch.randn(5, 7)
        if bad is None:
            logits[3] = float("-inf")
        else:
            logits[3, column] = bad
        with pytest.raises(TilewrightError, match="token 3 has a largest router logit of"):
            softmax_topk(logits, 2, renormalize=True)

    @pytest.mark.parametrize(
        ("logits", "top_k", "said"),
        [
            (torch.zeros(2, 4), 5, "cannot choose 5 of 4 experts; top_k must be from 1 to 4"),
            (torch.zeros(2, 4), 0, "cannot choose 0 of 4 experts"),
            (torch.zeros(2, 4, dtype=torch.float64), 1, "logits has dtype torch.float64"),
            (torch.zeros(4), 1, "logits is torch.float32 [4] on cpu"),
            (torch.zeros(2, 4, requires_grad=True), 1, "logits requires grad"),
        ],
    )
    def test_logits_of_another_kind_are_refused(self, logits, top_k, said):
        with pytest.raises(TilewrightError) as caught:
            softmax_topk(logits, top_k, renormalize=False)
        assert said in str(caught.value)

    @pytest.mark.parametrize("name", ["topk_ids", "topk_weights"])
    def test_result_buffers_must_fit(self, name):
        buffers = {"topk_ids": torch.empty(2, 2, dtype=torch.int32), "topk_weights": torch.empty(2, 2)}
        buffers[name] = buffers[name][:1]
        with pytest.raises(TilewrightError, match=f"{name} is .*expected a contiguous buffer"):
            softmax_topk_into(torch.zeros(2, 4), True, **buffers)


class TestNativeRouting(Native, RoutingTests):
    pass


class TestPureRouting(Pure, RoutingTests):
    pass
