import threading

import numpy as np
import pytest
import torch

from tilewright import runtime
from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, TilewrightWarning, grouped_gemm, moe_down, moe_up, prepare
from tilewright.runtime.notices import forget_warnings

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.runtime.TilewrightWarning")

EXPERTS, HIDDEN, INTER, TOP_K = 5, 8, 6, 2


@pytest.fixture(autouse=True)
def _no_database(tmp_path, monkeypatch):
    forget_warnings()
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "none.db"))


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(EXPERTS, 2 * INTER, HIDDEN, generator=generator),
        torch.randn(EXPERTS, HIDDEN, INTER, generator=generator),
    )


@pytest.fixture
def experts(weights):
    return Experts(*weights, top_k=TOP_K)


def dense(x, logits, weights):
    """Every expert for every token, then only the chosen ones kept."""
    w_up, w_down = weights
    scale, ids = logits.softmax(-1).topk(TOP_K)
    scale = scale / scale.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,erh->ter", x, w_up).chunk(2, -1)
    every = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w_down)
    return torch.einsum("tk,tkh->th", scale, every.gather(1, ids[..., None].expand(-1, -1, HIDDEN)))


def make_call(*leading):
    return torch.randn(*leading, HIDDEN), torch.randn(*leading, EXPERTS)


@pytest.mark.parametrize("leading", [(1,), (7,), (2, 3), (2, 1, 2)])
def test_any_leading_dimensions(experts, weights, leading):
    x, logits = make_call(*leading)
    out = experts(x, logits)
    assert out.shape == x.shape
    expected = dense(x.reshape(-1, HIDDEN), logits.reshape(-1, EXPERTS), weights)
    torch.testing.assert_close(out.reshape(-1, HIDDEN), expected, rtol=1e-4, atol=1e-4)


def test_strided_inputs(experts, weights):
    x, logits = make_call(4)
    out = experts(x.T.contiguous().T, logits.T.contiguous().T)
    torch.testing.assert_close(out, dense(x, logits, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(experts, shape):
    x, logits = make_call(*shape)
    assert experts(x, logits).shape == x.shape


def test_output_may_be_given_and_may_be_the_input(experts, weights):
    x, logits = make_call(4)
    expected = dense(x, logits, weights)
    out = torch.empty_like(x)
    assert experts(x, logits, out) is out
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    experts(x, logits, x)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_buffers_are_kept_and_grow(experts, weights):
    for tokens in (3, 9, 2, 9, 1):
        x, logits = make_call(tokens)
        torch.testing.assert_close(experts(x, logits), dense(x, logits, weights), rtol=1e-4, atol=1e-4)
    held = experts.memory_bytes
    experts(*make_call(9))
    assert experts.memory_bytes == held >= 9 * TOP_K * INTER * 4


def test_calls_in_and_out_of_inference_mode_share_buffers(experts):
    x, logits = make_call(3)
    with torch.inference_mode():
        first = experts(x, logits).clone()
    torch.testing.assert_close(experts(x, logits), first)


def test_threads_do_not_share_buffers(experts, weights):
    calls = [make_call(tokens) for tokens in (1, 2, 3, 4)]
    expected = [dense(x, logits, weights) for x, logits in calls]
    wrong = []

    def work(index):
        results = [experts(*calls[index]) for _ in range(20)]
        wrong.extend(index for out in results if not torch.allclose(out, expected[index], rtol=1e-4, atol=1e-4))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unrenormalised_weights(weights):
    x, logits = make_call(3)
    total = logits.softmax(-1).topk(TOP_K).values.sum(-1, keepdim=True)
    out = Experts(*weights, top_k=TOP_K, renormalize=False)(x, logits)
    torch.testing.assert_close(out, total * dense(x, logits, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w_up": torch.zeros(EXPERTS, 2 * INTER + 1, HIDDEN)}, r"w_up has shape \[5, 13, 8\].*expected \[5, 12, 8\]"),
        ({"w_up": torch.zeros(EXPERTS, 2 * INTER, HIDDEN, dtype=torch.bfloat16)}, "w_up has dtype torch.bfloat16"),
        ({"w_down": torch.zeros(0, HIDDEN, INTER)}, "w_down is empty"),
        ({"w_down": torch.zeros(HIDDEN, INTER)}, r"w_down has shape \[8, 6\]"),
        ({"top_k": 6}, "top_k=6 is impossible with 5 experts"),
        ({"top_k": 0}, "top_k=0 is impossible"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"bias_up": torch.zeros(EXPERTS, INTER)}, r"bias has shape \[5, 6\]"),
        ({"all_experts": 4}, "all_experts=4 is less than the 5"),
    ],
)
def test_experts_that_do_not_fit_are_named(weights, change, said):
    arguments = {"w_up": weights[0], "w_down": weights[1], "top_k": TOP_K} | change
    with pytest.raises(TilewrightError, match=said):
        Experts(**arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, HIDDEN + 1)}, r"x has shape \[3, 9\]; expected \[..., hidden=8\]"),
        ({"x": torch.tensor(1.0)}, r"x has shape \[\]; expected"),
        ({"x": torch.zeros(3, HIDDEN, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(4, HIDDEN)}, "x has 4 tokens, but 3 were routed"),
        ({"x": np.zeros((3, HIDDEN), np.float32)}, "x is a ndarray"),
        ({"topk_ids": torch.tensor([[0, 1], [5, 2], [0, 1]])}, "token 1.*5"),
        ({"topk_ids": torch.tensor([[0, 1], [0, -2], [0, 1]])}, "token 1.*-2"),
        ({"topk_ids": torch.zeros(3, TOP_K)}, "float32"),
        ({"topk_weights": torch.tensor([[0.5, 0.5], [torch.nan, 1], [0, 1]])}, "topk_weights"),
        ({"topk_weights": torch.full((3, TOP_K), torch.inf)}, "topk_weights"),
        ({"topk_weights": torch.zeros(3, 1)}, r"topk_weights has shape \[3, 1\]"),
        ({"out": torch.zeros(2, HIDDEN)}, r"out has shape \[2, 8\]"),
        ({"x": torch.zeros(3, 1, HIDDEN), "out": torch.zeros(3, HIDDEN)}, r"expected a contiguous tensor \[3, 1, 8\]"),
        ({"topk_ids": torch.zeros(3, 3, dtype=torch.int32)}, r"topk_ids has shape \[3, 3\]; expected \[..., top_k=2\]"),
    ],
)
def test_calls_that_do_not_fit_are_named(experts, change, said):
    arguments = {
        "x": torch.zeros(3, HIDDEN),
        "topk_ids": torch.zeros(3, TOP_K, dtype=torch.int32),
        "topk_weights": torch.zeros(3, TOP_K),
    } | change
    with pytest.raises(TilewrightError, match=said):
        experts.run(**arguments)


def test_logits_that_are_not_numbers_are_named(experts):
    x, logits = make_call(3)
    logits[2, 1] = torch.nan
    with pytest.raises(TilewrightError, match="2"):
        experts(x, logits)


def test_logits_for_other_experts_are_named(experts):
    with pytest.raises(TilewrightError, match=r"router_logits has shape \[3, 6\]; expected \[..., experts=5\]"):
        experts(torch.zeros(3, HIDDEN), torch.zeros(3, 6))


def test_a_rank_of_many_does_not_route(weights):
    experts = Experts(*weights, top_k=TOP_K, all_experts=10)
    with pytest.raises(TilewrightError, match="holds 5 of 10 experts"):
        experts(*make_call(2))


def test_gradients_are_refused(experts):
    x, logits = make_call(2)
    with pytest.raises(TilewrightError, match="grad"):
        experts(x.requires_grad_(), logits)
    with torch.no_grad():
        experts(x, logits)


def test_functions_without_a_plan_agree_with_experts(experts, weights):
    x, logits = make_call(4)
    ids, scale = runtime.softmax_topk(logits, TOP_K, True)
    row_token, offsets, slot_row = runtime.sort_tokens(ids, EXPERTS)
    inner = moe_up(x, weights[0], row_token, offsets, top_k=TOP_K)
    torch.testing.assert_close(moe_down(inner, weights[1], offsets, slot_row, scale), experts(x, logits))
    out = torch.empty(len(row_token), HIDDEN)
    assert grouped_gemm(inner, weights[1], offsets, out=out) is out


def test_functions_take_the_bias_into_account(weights):
    w_down, offsets = weights[1], torch.tensor([0, 1, 1, 1, 1, 2], dtype=torch.int32)
    x, bias = torch.zeros(2, INTER), torch.arange(EXPERTS * HIDDEN, dtype=torch.float32).reshape(EXPERTS, HIDDEN)
    assert torch.equal(grouped_gemm(x, w_down, offsets, bias=bias), bias[[0, 4]])
    bias += 1
    assert torch.equal(grouped_gemm(x, w_down, offsets, bias=bias), bias[[0, 4]])
    assert torch.equal(grouped_gemm(x, w_down, offsets), torch.zeros(2, HIDDEN))


def test_functions_refuse_weights_that_cannot_own_their_packed_copy(weights):
    with pytest.raises(TilewrightError, match="must be torch tensors"):
        grouped_gemm(torch.zeros(1, INTER), weights[1].numpy(), torch.tensor([0, 1, 1, 1, 1, 1], dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stage": "sideways"}, "stage='sideways' is impossible"),
        ({"stage": "plain", "top_k": 2}, "leave top_k=2 out"),
        ({"stage": "down", "activation": "swiglu"}, "has no activation"),
        ({"stage": "up", "top_k": 0}, "top_k=0"),
    ],
)
def test_prepare_names_what_does_not_fit(arguments, said):
    with pytest.raises(TilewrightError, match=said):
        prepare(torch.zeros(2, 4, 3), **arguments)


def test_prepare_needs_as_many_gate_as_up_rows():
    with pytest.raises(TilewrightError, match="has 5 rows per expert; swiglu needs"):
        prepare(torch.zeros(2, 5, 3), stage="up", activation="swiglu")


def test_weights_may_be_parameters_and_strided(weights):
    w_down = torch.nn.Parameter(weights[1].transpose(1, 2).contiguous().transpose(1, 2))
    assert not w_down.is_contiguous()
    offsets = torch.tensor([0, 1, 1, 1, 1, 1], dtype=torch.int32)
    x = torch.ones(1, INTER)
    out = prepare(w_down, stage="plain")(x, offsets, torch.empty(1, HIDDEN))
    torch.testing.assert_close(out, x @ weights[1][0].T)


def test_warning_points_at_the_caller(weights):
    with pytest.warns(TilewrightWarning, match="there is no database") as caught:
        Experts(*weights, top_k=TOP_K)
    assert {warning.filename for warning in caught} == {__file__}
    assert len(caught) == 2  # up and down
