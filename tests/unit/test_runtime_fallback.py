import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.routing.spec import sort_tokens
from tilewright.errors import TilewrightError
from tilewright.runtime.ops.moe_gemm import fallback_for
from tilewright.runtime.weights.experts import DeclaredWeights, PackedWeights, checked_bias, checked_weight


def clamped(gate, up):
    gate = torch.minimum(gate, torch.tensor(7.0))
    return gate / (1 + torch.exp(-1.702 * gate)) * (up.clip(-7, 7) + 1)


ACTIVATIONS = {
    "swiglu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "geglu": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    "swiglu_clamped": clamped,
}


def dense_reference(x, w_up, w_down, ids, scale, activation, bias_up, bias_down):
    """Token by token in float64, straight from the definition of an expert FFN."""
    out = torch.zeros(x.shape[0], w_down.shape[1], dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot, expert in enumerate(ids[token].tolist()):
            if expert < 0:
                continue
            y = w_up[expert].double() @ x[token].double()
            y = y if bias_up is None else y + bias_up[expert].double()
            if activation != "none":
                y = ACTIVATIONS[activation](*y.split(len(y) // 2))
            y = w_down[expert].double() @ y
            y = y if bias_down is None else y + bias_down[expert].double()
            out[token] += scale[token, slot].double() * y
    return out


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    activation=st.sampled_from(["none", *ACTIVATIONS]),
    bias=st.booleans(),
    elsewhere=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_up_and_down_compose_to_the_definition(tokens, experts, top_k, activation, bias, elsewhere, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, inter, halves = 5, 3, 1 if activation == "none" else 2

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, w_up, w_down = normal(tokens, hidden), normal(experts, halves * inter, hidden), normal(experts, hidden, inter)
    bias_up = normal(experts, halves * inter) if bias else None
    bias_down = normal(experts, hidden) if bias else None
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    ids[torch.rand((tokens, top_k), generator=generator) < elsewhere] = -1
    scale = torch.rand((tokens, top_k), generator=generator)
    order = sort_tokens(ids.numpy(), experts)
    row_token, offsets, slot_row = map(torch.from_numpy, (order.row_token, order.expert_offsets, order.slot_row))

    shared = {"experts": experts, "top_k": top_k, "bias": bias}
    up = MoeGemmSignature(stage="up", n=inter, k=hidden, activation=activation, **shared)
    down = MoeGemmSignature(stage="down", n=hidden, k=inter, **shared)
    inner = torch.full((len(row_token), inter), torch.nan)
    out = torch.full((tokens, hidden), torch.nan)
    fallback_for(up, DeclaredWeights(w_up), bias_up)(x, row_token, offsets, inner)
    fallback_for(down, DeclaredWeights(w_down), bias_down)(inner, offsets, slot_row, scale, out)

    expected = dense_reference(x, w_up, w_down, ids, scale, activation, bias_up, bias_down)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_plain_writes_only_rows_of_their_expert():
    weight = torch.stack([torch.eye(3), 2 * torch.eye(3), 3 * torch.eye(3)])
    x, out = torch.ones(4, 3), torch.full((4, 3), torch.nan)
    signature = MoeGemmSignature(stage="plain", experts=3, n=3, k=3)
    fallback_for(signature, DeclaredWeights(weight), None)(x, torch.tensor([0, 1, 1, 4], dtype=torch.int32), out)
    assert out[:, 0].tolist() == [1, 3, 3, 3]


def test_an_absent_slot_adds_nothing_even_beside_an_infinity():
    signature = MoeGemmSignature(stage="down", experts=1, n=1, k=1, top_k=2)
    x, slot_row = torch.tensor([[torch.inf], [2.0]]), torch.tensor([[-1, 1]], dtype=torch.int32)
    out, offsets = torch.empty(1, 1), torch.tensor([0, 2], dtype=torch.int32)
    fallback_for(signature, DeclaredWeights(torch.ones(1, 1, 1)), None)(x, offsets, slot_row, torch.ones(1, 2), out)
    assert out.item() == 2.0


@pytest.mark.parametrize("made_inside", [False, True])
def test_fallback_writes_outputs_of_either_grad_mode(made_inside):
    with torch.inference_mode(made_inside):
        out = torch.empty(1, 1)
    signature = MoeGemmSignature(stage="plain", experts=1, n=1, k=1)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    fallback_for(signature, DeclaredWeights(torch.ones(1, 1, 1)), None)(torch.ones(1, 1), offsets, out)
    assert out.item() == 1.0


def pack_by_definition(weight, layout):
    """Element by element from WeightLayout's docstring."""
    experts, n, k = weight.shape
    half_rows = n // layout.halves
    run = layout.run or layout.columns
    packed = np.zeros((experts, layout.panels(n), k, layout.columns), np.float32)
    for half in range(layout.halves):
        for j in range(half_rows):
            column = j // run * run * layout.halves + half * run + j % run
            packed[:, column // layout.columns, :, column % layout.columns] = weight[:, half * half_rows + j, :]
    return torch.from_numpy(packed)


@pytest.mark.parametrize(
    "layout",
    [
        WeightLayout(8),
        WeightLayout(16),
        WeightLayout(8, halves=2, run=4),
        WeightLayout(16, halves=2, run=2),
        WeightLayout(4, halves=2, run=4),
    ],
    ids=lambda layout: layout.key,
)
@pytest.mark.parametrize("n", [16, 22])
def test_packed_weights_read_back_as_declared(layout, n):
    weight = torch.randn(3, n, 5)
    packed = PackedWeights(pack_by_definition(weight, layout), layout, n, weight.shape[2])
    for expert in range(3):
        assert torch.equal(packed.expert(expert), weight[expert])


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.float64), "dtype torch.float64"),
        (torch.zeros(2, 3), r"shape \[2, 3\]"),
        (torch.zeros(0, 3, 4), "is empty"),
        (torch.zeros(2, 3, 4, device="meta"), "device meta"),
        (torch.zeros(2, 3, 4).to_sparse(), "layout torch.sparse_coo"),
        ([[1.0]], "is a list"),
    ],
)
def test_weights_that_do_not_fit_are_named(weight, said):
    with pytest.raises(TilewrightError, match=rf"^up: weight .*{said}.*"):
        checked_weight(weight, what="up: weight", dims="experts, n, k")


def test_any_dlpack_array_is_a_weight_and_shares_its_memory():
    array = np.ones((2, 3, 4), np.float32)
    assert checked_weight(array, what="w", dims="experts, n, k").data_ptr() == array.ctypes.data


def test_bias_of_another_shape_is_named():
    with pytest.raises(TilewrightError, match=r"bias has shape \[2, 4\]; .* expected \[2, 3\]"):
        checked_bias(torch.zeros(2, 4), what="bias", weight=torch.zeros(2, 3, 5))
