"""What plain torch serves on a GPU: results against the declarations, on posed tensors, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from awkward import examples, weights
from covering import FULL
from numpy.typing import NDArray
from posing import pose, posing, values
from waiting import NothingIsWaitedFor

from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.runtime.ops import gating
from tilewright.runtime.torch import experts_on_device
from tilewright.runtime.torch.attention_on_device import attention_fallback
from tilewright.runtime.torch.experts_on_device import experts_fallback
from tilewright.runtime.weights.experts import DeclaredWeights
from tilewright.tuner.evaluation.checking import compare_all

Fallback = Callable[..., None]


@pytest.fixture(autouse=True)
def _posing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with posing(monkeypatch):
        yield


def some(op_name: str) -> Sequence[Signature]:
    """Every fifth of an op's signatures, which cost half a second each."""
    signatures = examples_of(op_name).signatures
    return signatures if FULL else signatures[::5]


def posed(array: NDArray[Any]) -> torch.Tensor:
    return pose(torch.from_numpy(np.ascontiguousarray(array)))


def check(op_name: str, signature: Signature, fallback: Fallback, *, waits: bool = False) -> None:
    """Every example of ``signature``: outputs are full of poison before."""
    inputs, outputs = ([s.name for s in signature.tensors() if s.role == role] for role in ("input", "output"))
    for example in examples(op_name, signature):
        made = {}
        for name in outputs:
            like = example.expected[name]
            made[name] = posed(np.full_like(like, np.nan if like.dtype.kind == "f" else -7))
        with nullcontext() if waits else NothingIsWaitedFor():
            fallback(*(posed(example.inputs[name]) for name in inputs), *made.values())
        found = {name: values(tensor).numpy() for name, tensor in made.items()}
        assert compare_all(found, example.expected, find_op(op_name).tolerance(signature)).complaint is None


def experts_of(signature: MoeGemmSignature) -> Fallback:
    held = {name: posed(array) for name, array in weights("moe_gemm", signature).items()}
    return experts_fallback(signature, DeclaredWeights(held["weight"]), held.get("bias"))


@pytest.mark.parametrize("signature", some("moe_gemm"), ids=lambda each: each.describe())
def test_experts_where_torch_multiplies_expert_by_expert(
    signature: MoeGemmSignature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_on_device, "_torch_grouped", refuse)
    monkeypatch.setattr(experts_on_device, "_refused", set())
    check("moe_gemm", signature, experts_of(signature), waits=True)


def refuse(*_: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    "signature",
    [each for each in examples_of("moe_gemm").signatures if each.k % 4 == 0][:3],
    ids=lambda s: s.describe(),
)
def test_experts_where_torch_multiplies_all_at_once(
    signature: MoeGemmSignature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_on_device, "_expert_by_expert", refuse)
    check("moe_gemm", signature, experts_of(signature))


def test_torchs_grouped_product_is_asked_for_once_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(experts_on_device, "_refused", set())
    monkeypatch.setattr(experts_on_device, "_torch_grouped", lambda *_: asked.append(0) or refuse())
    fallback = experts_fallback(
        MoeGemmSignature(stage="plain", experts=1, n=4, k=4), DeclaredWeights(ones(1, 4, 4)), None
    )
    for _ in range(2):
        out = ones(3, 4)
        fallback(ones(3, 4), pose(torch.tensor([0, 3], dtype=torch.int32)), out)
        assert values(out).tolist() == [[4.0] * 4] * 3
    assert len(asked) == 1


def ones(*shape: int) -> torch.Tensor:
    return pose(torch.ones(shape))


def test_rows_of_no_expert_touch_nothing() -> None:
    """As where some choices are on other ranks: buffers have rows for them, which nothing reads."""
    signature = MoeGemmSignature(stage="down", experts=2, n=4, k=4, top_k=2)
    fallback = experts_fallback(signature, DeclaredWeights(ones(2, 4, 4)), None)
    x = pose(torch.full((4, 4), torch.nan))
    x[:2] = 1.0
    slot_row, out = pose(torch.tensor([[0, -1], [-1, 1]], dtype=torch.int32)), pose(torch.empty(2, 4))
    with NothingIsWaitedFor():
        fallback(x, pose(torch.tensor([0, 1, 2], dtype=torch.int32)), slot_row, ones(2, 2), out)
    assert values(out).tolist() == [[4.0] * 4] * 2


@pytest.mark.parametrize("signature", some("gating"), ids=lambda each: each.describe())
def test_gates(signature: Any) -> None:
    bias = weights("gating", signature).get("bias")
    check("gating", signature, gating.fallback_for(signature, None if bias is None else posed(bias), is_host=False))


@pytest.mark.parametrize("signature", some("attention"), ids=lambda each: each.describe())
def test_attention(signature: Any) -> None:
    sinks = weights("attention", signature).get("sinks")
    check("attention", signature, attention_fallback(signature, None if sinks is None else posed(sinks)))


def test_what_lies_behind_a_sequence_may_be_anything() -> None:
    signature = examples_of("attention").signatures[0]
    example = examples("attention", signature)[0]
    inputs = {name: array.copy() for name, array in example.inputs.items()}
    used = -(-inputs["lengths"] // signature.page_size)
    beyond = np.arange(inputs["block_table"].shape[1]) >= used[:, None]
    assert beyond.any()
    inputs["block_table"][beyond] = 1 << 30
    for row, length in enumerate(inputs["lengths"]):
        if length % signature.page_size:
            last = inputs["block_table"][row, used[row] - 1]
            for cache in ("k_cache", "v_cache"):
                inputs[cache][last, length % signature.page_size :] = np.nan
    out = posed(np.zeros_like(example.expected["out"]))
    attention_fallback(signature, None)(*(posed(each) for each in inputs.values()), out)
    tolerance = find_op("attention").tolerance(signature)
    assert compare_all({"out": values(out).numpy()}, example.expected, tolerance).complaint is None
