"""The runtime with real kernels and a real database: the right kernel for each size, packed once, right results."""

import gc
import itertools

import pytest
import torch
from naive_kernels import build, needs_compiler, store_plan

from tilewright import runtime
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.recipe.model import Guard
from tilewright.runtime import (
    Experts,
    ServeOptions,
    TilewrightWarning,
    grouped_gemm,
    memory_report,
    moe_down,
    moe_up,
    prepare,
)
from tilewright.runtime.notices import forget_warnings

pytestmark = needs_compiler

EXPERTS, HIDDEN, INTER, TOP_K = 4, 10, 6, 2


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """Every test has its own cache and no database but the one it makes."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "tuning.db"))
    forget_warnings()


def clamped(gate, up):
    return gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)) * (up.clamp(-7, 7) + 1)


ACTIVATIONS = {
    "swiglu": lambda gate, up: torch.nn.functional.silu(gate) * up,
    "geglu": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    "swiglu_clamped": clamped,
}


def up_signature(activation="swiglu", bias=False):
    return MoeGemmSignature(
        stage="up", experts=EXPERTS, n=INTER, k=HIDDEN, top_k=TOP_K, activation=activation, bias=bias
    )


def down_signature(bias=False):
    return MoeGemmSignature(stage="down", experts=EXPERTS, n=HIDDEN, k=INTER, top_k=TOP_K, bias=bias)


def expert_ffn(x, w_up, w_down, ids, scale, activation="swiglu", bias_up=None, bias_down=None):
    """Token by token in float64, from the definition."""
    out = torch.zeros(x.shape[0], HIDDEN, dtype=torch.float64)
    for token, slot in itertools.product(range(x.shape[0]), range(TOP_K)):
        expert = int(ids[token, slot])
        if expert < 0:
            continue
        y = w_up[expert].double() @ x[token].double() + (0 if bias_up is None else bias_up[expert].double())
        if activation != "none":
            y = ACTIVATIONS[activation](*y.split(INTER))
        y = w_down[expert].double() @ y + (0 if bias_down is None else bias_down[expert].double())
        out[token] += scale[token, slot].double() * y
    return out


def make_weights(activation="swiglu"):
    generator = torch.Generator().manual_seed(5)
    rows = INTER * (1 if activation == "none" else 2)
    return (
        torch.randn(EXPERTS, rows, HIDDEN, generator=generator),
        torch.randn(EXPERTS, HIDDEN, INTER, generator=generator),
    )


def make_call(tokens):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x, torch.randn(tokens, EXPERTS, generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize("packed", [None, 1, 2], ids=["declared", "neighbouring panels", "side by side"])
def test_experts_with_kernels_for_both_stages(tmp_path, activation, packed, bias):
    halves = 1 if activation == "none" else 2
    up_layout = WeightLayout(4 * packed, halves=halves, run=4 if halves == 2 else 0) if packed else None
    up, down = up_signature(activation, bias), down_signature(bias)
    store_plan(tmp_path / "tuning.db", up, [(None, build(up, layout=up_layout))])
    store_plan(
        tmp_path / "tuning.db", down, [(None, build(down, layout=WeightLayout(8) if packed else None, mark=2.0))]
    )
    w_up, w_down = make_weights(activation)
    biases = {"bias_up": torch.randn(w_up.shape[:2]), "bias_down": torch.randn(EXPERTS, HIDDEN)} if bias else {}

    experts = Experts(w_up, w_down, top_k=TOP_K, activation=activation, **biases)
    for tokens in (1, 7, 3):
        x, logits = make_call(tokens)
        scale, ids = logits.softmax(-1).topk(TOP_K)
        scale /= scale.sum(-1, keepdim=True)
        expected = 2 * expert_ffn(x, w_up, w_down, ids, scale, activation, **biases)  # the down kernel doubles
        torch.testing.assert_close(experts(x, logits).double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experts.run(x, ids, scale).double(), expected, rtol=1e-4, atol=1e-4)


def test_experts_of_one_rank_leave_out_choices_of_others(tmp_path):
    up, down = up_signature(), down_signature()
    store_plan(tmp_path / "tuning.db", up, [(None, build(up))])
    store_plan(tmp_path / "tuning.db", down, [(None, build(down, mark=2.0))])
    w_up, w_down = make_weights()
    experts = Experts(w_up, w_down, top_k=TOP_K, all_experts=2 * EXPERTS)
    x, _ = make_call(5)
    scale = torch.rand(5, TOP_K)
    for choices in ([[0, -1], [-1, -1], [3, 1], [-1, 2], [1, 0]], [[-1, -1]] * 5):
        ids = torch.tensor(choices)
        expected = 2 * expert_ffn(x, w_up, w_down, ids, scale)
        torch.testing.assert_close(experts.run(x, ids, scale).double(), expected, rtol=1e-4, atol=1e-4)


def test_each_size_gets_the_kernel_of_its_range(tmp_path):
    signature = MoeGemmSignature(stage="plain", experts=1, n=2, k=3)
    entries = [(1, build(signature, mark=2.0)), (3, None), (5, build(signature, mark=3.0))]
    store_plan(tmp_path / "tuning.db", signature, entries)
    prepared = prepare(torch.ones(1, 2, 3), stage="plain")

    def mark(rows):
        out = prepared(torch.ones(rows, 3), torch.tensor([0, rows], dtype=torch.int32), torch.empty(rows, 2))
        return out.unique().item() / 3

    assert [mark(rows) for rows in range(1, 6)] == [2, 1, 1, 3, 3]
    with pytest.warns(TilewrightWarning, match="no kernel for rows above 5") as caught:
        assert [mark(rows) for rows in (6, 7)] == [1, 1]
    assert len(caught) == 1

    text = str(prepared.explain())
    assert "rows <= 1        moe_gemm/naive" in text
    assert "rows <= 3        torch: the plan found nothing faster" in text
    assert "12.5 us at 8 (default config 25.0 us)" in text
    assert "rows > 5         torch: the plan ends below these sizes" in text
    assert "of test-model; timing: measured, checked: device; weight as declared" in text


def test_the_plan_with_the_nearest_thread_count_serves(tmp_path):
    signature = MoeGemmSignature(stage="plain", experts=1, n=1, k=1)
    for threads in (1, 4):
        store_plan(tmp_path / "tuning.db", signature, [(None, build(signature, mark=threads))], threads=threads)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    for asked, made_for in ((1, 1), (2, 1), (3, 4), (4, 4), (64, 4)):
        prepared = prepare(torch.ones(1, 1, 1), stage="plain", options=ServeOptions(threads=asked))
        assert prepared(torch.ones(1, 1), offsets, torch.empty(1, 1)).item() == made_for


def test_functions_pack_a_weight_once_and_again_after_it_changed(tmp_path):
    up, down, plain = (
        up_signature(),
        down_signature(),
        MoeGemmSignature(stage="plain", experts=EXPERTS, n=HIDDEN, k=INTER),
    )
    for signature in (up, down, plain):
        layout = WeightLayout(4, halves=2, run=2) if signature is up else WeightLayout(4)
        store_plan(tmp_path / "tuning.db", signature, [(None, build(signature, layout=layout, mark=2.0))])
    w_up, w_down = make_weights()
    x, _ = make_call(3)
    ids, scale = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, TOP_K)
    row_token, offsets, slot_row = runtime.sort_tokens(ids, EXPERTS)
    gc.collect()  # of what earlier tests prepared
    before = memory_report().total_bytes

    for _ in range(2):
        inner = moe_up(x, w_up, row_token, offsets, top_k=TOP_K)
        out = moe_down(inner, w_down, offsets, slot_row, scale)
        torch.testing.assert_close(out.double(), 4 * expert_ffn(x, w_up, w_down, ids, scale), rtol=1e-4, atol=1e-4)
        gc.collect()  # a copy that was replaced is a part of a cycle
        packed = memory_report().total_bytes - before
        assert packed > 0
        w_down *= -0.5
    out = moe_down(inner, w_down, offsets, slot_row, scale)
    torch.testing.assert_close(out.double(), 4 * expert_ffn(x, w_up, w_down, ids, scale), rtol=1e-4, atol=1e-4)
    gc.collect()
    assert memory_report().total_bytes - before == packed

    rows = grouped_gemm(inner, w_down, offsets)
    expert = int(ids.flatten().min())
    torch.testing.assert_close(rows[0], 2 * w_down[expert] @ inner[0])
    assert memory_report().total_bytes - before > packed

    del w_up, w_down
    gc.collect()
    assert memory_report().total_bytes == before


def test_memory_is_stated(tmp_path):
    signature = MoeGemmSignature(stage="plain", experts=2, n=5, k=3)
    store_plan(tmp_path / "tuning.db", signature, [(None, build(signature, layout=WeightLayout(4)))])
    prepared = prepare(torch.ones(2, 5, 3), stage="plain")
    assert prepared.memory_bytes == 2 * 2 * 3 * 4 * 4  # experts, panels of 4 columns for 5, k, columns, bytes
    assert prepared.memory in memory_report().uses
    assert "in all" in str(memory_report())
    assert any(explanation.memory is prepared.memory for explanation in runtime.explain())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("implementation", ["native", "pure"])
def test_a_plan_of_two_weight_layouts_holds_two_copies(tmp_path, monkeypatch, implementation, keep):
    if implementation == "pure":
        monkeypatch.setattr("tilewright.runtime.calls.bind._NATIVE", None)
    signature = MoeGemmSignature(stage="plain", experts=2, n=5, k=3)
    narrow, wide = (
        build(signature, layout=WeightLayout(4), mark=2.0),
        build(signature, layout=WeightLayout(8), mark=3.0),
    )
    declared = build(signature, mark=5.0)
    entries = [(2, narrow), (4, wide), (6, declared), (8, narrow), (9, None)]
    store_plan(tmp_path / "tuning.db", signature, entries, copies=True)
    weight = torch.randn(2, 5, 3)
    prepared = prepare(weight, stage="plain", options=ServeOptions(keep_weights=keep))
    for rows, mark in ((1, 2), (2, 2), (3, 3), (4, 3), (6, 5), (7, 2), (9, 1)):
        x, split = torch.randn(rows, 3), rows // 2
        out = prepared(x, torch.tensor([0, split, rows], dtype=torch.int32), torch.empty(rows, 5))
        expected = torch.cat([x[:split] @ weight[0].T, x[split:] @ weight[1].T])
        torch.testing.assert_close(out, mark * expected)
    assert prepared.memory_bytes == 2 * 2 * 3 * 4 * 4 + 2 * 1 * 3 * 8 * 4  # experts, panels, k, columns, bytes
    assert "weight panel4_fp32 and panel8_fp32 and as declared" in str(prepared.explain())


def test_experts_that_let_their_weights_go_still_fall_back(tmp_path):
    up, down = up_signature(), down_signature()
    guards = (Guard("tokens", 2),)
    store_plan(tmp_path / "tuning.db", up, [(None, build(up, layout=WeightLayout(8, halves=2, run=2), guards=guards))])
    store_plan(tmp_path / "tuning.db", down, [(None, build(down, layout=WeightLayout(4), guards=guards))])
    w_up, w_down = make_weights()
    experts = Experts(w_up.clone(), w_down.clone(), top_k=TOP_K, options=ServeOptions(keep_weights=False))
    x, _ = make_call(3)
    ids, scale = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.rand(3, TOP_K)
    with pytest.warns(TilewrightWarning) as caught:
        out = experts.run(x, ids, scale)
    assert len(caught) == 2  # one for each stage
    torch.testing.assert_close(out.double(), expert_ffn(x, w_up, w_down, ids, scale), rtol=1e-4, atol=1e-4)
