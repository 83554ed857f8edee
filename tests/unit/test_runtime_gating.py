"""Gates where plain torch serves: results against the declaration, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
from awkward import examples, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError
from tilewright.runtime import Gate, ServeOptions, TilewrightWarning, softmax_topk
from tilewright.runtime.ops.gating import stable_topk
from tilewright.tuner.evaluation.checking import compare_all

NOWHERE = "/nowhere/at/all.db"


def gate(*arguments, **options) -> Gate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TilewrightWarning)
        return Gate.of(*arguments, options=ServeOptions(database=NOWHERE), **options)


@pytest.mark.parametrize("signature", examples_of("gating").signatures, ids=lambda s: s.describe())
def test_torch_gives_what_the_op_declares(signature) -> None:
    held = weights("gating", signature).get("bias")
    bias = None if held is None else torch.from_numpy(held)
    fields = {name: value for name, value in signature.to_dict().items() if name not in ("op", "bias")}
    made = gate(fields.pop("experts"), fields.pop("top_k"), bias=bias, **fields)
    assert made.signature == signature
    for example in examples("gating", signature):
        gated = made(torch.from_numpy(example.inputs["logits"]))
        outputs = {name: tensor.numpy() for name, tensor in gated._asdict().items() if tensor is not None}
        assert outputs.keys() == example.expected.keys()
        if "row_token" in outputs:
            assert outputs["row_token"].ndim == 1
            outputs["row_token"] = outputs["row_token"].reshape(outputs["topk_ids"].shape)
        assert compare_all(outputs, example.expected, find_op("gating").tolerance(signature)).complaint is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.integers(0, 999), st.data())
def test_equal_keys_are_taken_by_rising_id(tokens: int, experts: int, levels: int, seed: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    keys = torch.randint(0, levels, (tokens, experts), generator=torch.Generator().manual_seed(seed)).float()
    expected = [sorted(range(experts), key=lambda e: (-row[e], e))[:top_k] for row in keys.tolist()]
    assert stable_topk(keys, top_k).tolist() == expected


def test_the_runtimes_own_softmax_agrees() -> None:
    logits = torch.randn(33, 24)
    for renormalize in (True, False):
        ids, scale = softmax_topk(logits, 5, renormalize)
        gated = gate(24, 5, renormalize=renormalize)(logits)
        assert torch.equal(gated.topk_ids, ids)
        torch.testing.assert_close(gated.topk_weights, scale)


def test_no_tokens_give_empty_rows() -> None:
    gated = gate(5, 2, order="rows")(torch.empty(0, 5))
    assert gated.topk_ids.shape == (0, 2)
    assert gated.expert_offsets.tolist() == [0] * 6
    assert gated.row_token.numel() == 0


def test_ruled_out_experts_are_taken_last_and_weigh_nothing() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0]])
    gated = gate(4, 3)(logits)
    assert gated.topk_ids.tolist() == [[3, 1, 0]]
    assert gated.topk_weights[0, 2] == 0


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        (torch.tensor([[0.0, torch.nan, 0.0]]), "logits[0, 1] is nan; expected a number, or -inf"),
        (torch.tensor([[0.0, 0.0, torch.inf]]), "logits[0, 2] is inf"),
        (
            torch.full((1, 3), -torch.inf),
            "logits[0, 0] is -inf; expected a number, or -inf in a row with",
        ),
        (torch.zeros(1, 4), "logits has shape [1, 4]; expected [tokens, 3]"),
        (torch.zeros(3), "must be a torch tensor [tokens, 3]; it has shape [3]"),
        (np.zeros((1, 3), np.float32), "it has type ndarray"),
        (torch.zeros(1, 3, dtype=torch.float64), "logits has dtype torch.float64"),
    ],
)
def test_logits_that_cannot_be_routed_are_refused(logits, said: str) -> None:
    with pytest.raises(TilewrightError) as caught:
        gate(3, 2)(logits)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (torch.zeros(4), "bias has shape [4]; expected [3]"),
        (torch.zeros(3).double(), "must be a torch.float32 tensor [3] on the CPU or a GPU"),
        (torch.tensor([0.0, torch.nan, 0.0]), "bias holds NaN"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(bias, said: str) -> None:
    with pytest.raises(TilewrightError) as caught:
        gate(3, 2, score="sigmoid", bias=bias)
    assert said in str(caught.value)
