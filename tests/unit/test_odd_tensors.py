"""Whatever torch keeps beside a tensor's memory: every entry reads what a tensor says, or refuses it in a sentence."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.errors import TilewrightError
from tilewright.runtime import (
    Experts,
    Gate,
    PagedDecode,
    ServeOptions,
    VarlenPrefill,
    grouped_gemm,
    moe_down,
    moe_up,
    prepare,
    softmax_topk,
    sort_tokens,
)
from tilewright.runtime.calls.bind import pack_weight
from tilewright.runtime.calls.extension import find_keys, native_for_torch

NOWHERE = ServeOptions(database="/nonexistent/tuning.db", threads=1)
TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 3, 8, 8, 4, 2


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Entry:
    """A function of tensors, and tensors to call it with."""

    call: Callable[..., Any]
    tensors: dict[str, Tensor]
    outputs: tuple[str, ...] = ()
    returns: Callable[[Any], Tensor] = lambda result: result[0] if isinstance(result, tuple) else result


W_UP, W_DOWN = floats(EXPERTS, 2 * INTER, HIDDEN), floats(EXPERTS, HIDDEN, INTER)
X, LOGITS = floats(TOKENS, HIDDEN), floats(TOKENS, EXPERTS)
IDS, WEIGHTS = softmax_topk(LOGITS, TOP_K, renormalize=True)
ROW_TOKEN, OFFSETS, SLOT_ROW = sort_tokens(IDS, EXPERTS)
ROWS = TOKENS * TOP_K


def experts(**tensors: Tensor) -> Experts:
    weights = {"w_up": W_UP, "w_down": W_DOWN, **tensors}
    return Experts(**weights, top_k=TOP_K, options=NOWHERE)


def entries() -> dict[str, Entry]:
    layer = experts()
    gate = Gate.of(EXPERTS, TOP_K, options=NOWHERE)
    decode = PagedDecode.of(2, 1, 16, page_size=4, options=NOWHERE)
    prefill = VarlenPrefill.of(2, 1, 16, options=NOWHERE)
    plain = prepare(W_DOWN, stage="plain", options=NOWHERE)
    cache = floats(4, 1, 4, 16)
    out = torch.zeros(TOKENS, HIDDEN)
    return {
        "Experts": Entry(layer, {"x": X, "router_logits": LOGITS, "out": out}, ("out",)),
        "Experts.run": Entry(layer.run, {"x": X, "topk_ids": IDS, "topk_weights": WEIGHTS, "out": out}, ("out",)),
        "Experts of weights": Entry(
            lambda **given: experts(**given)(X, LOGITS),
            {
                "w_up": W_UP,
                "w_down": W_DOWN,
                "bias_up": floats(EXPERTS, 2 * INTER),
                "bias_down": floats(EXPERTS, HIDDEN),
            },
        ),
        "Gate": Entry(lambda logits: gate(logits)[1], {"logits": LOGITS}),
        "Gate of a bias": Entry(
            lambda bias: Gate.of(EXPERTS, TOP_K, score="sigmoid", bias=bias, options=NOWHERE)(LOGITS),
            {"bias": floats(EXPERTS)},
            returns=lambda result: result[1],
        ),
        "prepare": Entry(
            lambda **given: plain(*given.values()),
            {"x": floats(ROWS, INTER), "offsets": OFFSETS, "out": torch.zeros(ROWS, HIDDEN)},
            ("out",),
        ),
        "PagedDecode": Entry(
            decode,
            {
                "q": floats(2, 2, 16),
                "k_cache": cache,
                "v_cache": -cache,
                "block_table": integers([0, 1], [2, 3]),
                "lengths": integers(3, 4),
                "out": torch.zeros(2, 2, 16),
            },
            ("out",),
        ),
        "VarlenPrefill": Entry(
            prefill,
            {
                "q": floats(5, 2, 16),
                "k": floats(5, 1, 16),
                "v": floats(5, 1, 16) + 1,
                "cu_seqlens": integers(0, 2, 5),
                "out": torch.zeros(5, 2, 16),
            },
            ("out",),
        ),
        "sinks": Entry(
            lambda sinks: PagedDecode.of(2, 1, 16, page_size=4, sinks=sinks, options=NOWHERE)(
                floats(2, 2, 16), cache, -cache, integers([0, 1], [2, 3]), integers(3, 4)
            ),
            {"sinks": floats(2)},
        ),
        "grouped_gemm": Entry(
            lambda **given: grouped_gemm(**given, options=NOWHERE),
            {
                "x": floats(ROWS, INTER),
                "weight": W_DOWN.clone(),
                "expert_offsets": OFFSETS,
                "bias": floats(EXPERTS, HIDDEN),
                "out": torch.zeros(ROWS, HIDDEN),
            },
            ("out",),
        ),
        "moe_up": Entry(
            lambda **given: moe_up(**given, top_k=TOP_K, options=NOWHERE),
            {"x": X, "weight": W_UP.clone(), "row_token": ROW_TOKEN, "expert_offsets": OFFSETS},
        ),
        "moe_down": Entry(
            lambda **given: moe_down(**given, options=NOWHERE),
            {
                "x": floats(ROWS, INTER),
                "weight": W_DOWN.clone(),
                "expert_offsets": OFFSETS,
                "slot_row": SLOT_ROW,
                "topk_weights": WEIGHTS,
            },
        ),
        "sort_tokens": Entry(lambda ids: sort_tokens(ids, EXPERTS)[2], {"ids": IDS}),
        "softmax_topk": Entry(lambda logits: softmax_topk(logits, TOP_K, renormalize=True)[1], {"logits": LOGITS}),
        "pack_weight": Entry(lambda weight: pack_weight(weight, WeightLayout(4)), {"weight": W_DOWN}),
    }


@pytest.fixture(scope="module")
def known() -> dict[str, Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return entries()


class Wrapped(Tensor):
    """Says by itself what operators do."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("no operator may be called with it")


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


SAME = {
    "negative bit": lambda t: torch._neg_view(-t),
    "negative bit and strides": lambda t: torch._neg_view(strided(-t)),
    "imaginary part of a conjugate": lambda t: (
        torch.complex(torch.zeros_like(t), -t).conj().imag if t.is_floating_point() else torch._neg_view(-t)
    ),
    "strides": strided,
}
REFUSED = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.as_nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)], layout=torch.jagged),
    "subclass": lambda t: t.detach().clone().as_subclass(Wrapped),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "bool": lambda t: t.bool(),
    "zeros of autograd": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
}


def cases(known: dict[str, Entry]) -> list[tuple[str, Entry, str]]:
    return [(name, entry, tensor) for name, entry in known.items() for tensor in entry.tensors]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", SAME)
def test_every_entry_reads_what_a_tensor_says(known: dict[str, Entry], kind: str) -> None:
    for name, entry, tensor in cases(known):
        if tensor in entry.outputs:
            continue
        plain = {key: value.clone() for key, value in entry.tensors.items()}
        odd = {**plain, tensor: SAME[kind](plain[tensor])}
        found, expected = (entry.returns(entry.call(**given)) for given in (odd, plain))
        torch.testing.assert_close(found, expected, msg=f"{name} {tensor}")


@pytest.mark.parametrize("kind", REFUSED)
def test_every_entry_refuses_what_it_cannot_read_in_one_sentence(known: dict[str, Entry], kind: str) -> None:
    for name, entry, tensor in cases(known):
        try:
            odd = REFUSED[kind](entry.tensors[tensor].clone())
        except RuntimeError:  # torch has no such tensor of these numbers
            continue
        if odd.dtype == entry.tensors[tensor].dtype and kind == "double":
            continue
        with pytest.raises(TilewrightError) as refused:
            entry.call(**{**entry.tensors, tensor: odd})
        assert "\n" not in str(refused.value), (name, tensor)
        assert len(str(refused.value).split()) > 3, (name, tensor)


@pytest.mark.parametrize(
    "change",
    [torch._neg_view, lambda t: t[:1].expand(t.shape), lambda t: t.t() if t.dim() == 2 else t[..., :1].expand(t.shape)],
)
def test_an_output_whose_memory_is_not_its_own_is_refused(known: dict[str, Entry], change: Any) -> None:
    for name, entry in known.items():
        for tensor in entry.outputs:
            before = entry.tensors[tensor].clone()
            with pytest.raises(TilewrightError):
                entry.call(**{**entry.tensors, tensor: change(entry.tensors[tensor])})
            assert torch.equal(entry.tensors[tensor], before), (name, tensor)


def test_the_place_of_dispatch_keys_is_found_in_this_torch() -> None:
    if native_for_torch() is not None:
        assert find_keys() is not None, "every tensor is asked whether it is plain, which takes 0.1 us"
