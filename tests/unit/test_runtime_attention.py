"""Attention where plain torch serves: results against the declaration, and what is refused."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from awkward import examples, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError
from tilewright.runtime import PagedDecode, ServeOptions, TilewrightWarning, VarlenPrefill
from tilewright.tuner.evaluation.checking import compare_all

NOWHERE = "/nowhere/at/all.db"


def make(kind: type[PagedDecode] | type[VarlenPrefill], *arguments, **options) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TilewrightWarning)
        return kind.of(*arguments, options=ServeOptions(database=NOWHERE), **options)


@pytest.mark.parametrize("signature", examples_of("attention").signatures, ids=lambda s: s.describe())
def test_torch_gives_what_the_op_declares(signature) -> None:
    held = weights("attention", signature).get("sinks")
    options = {name: getattr(signature, name) for name in ("value_dim", "scale", "window")}
    options["sinks"] = None if held is None else torch.from_numpy(held)
    if signature.stage == "decode":
        options |= {"page_size": signature.page_size, "kv_layout": signature.kv_layout}
    kind = PagedDecode if signature.stage == "decode" else VarlenPrefill
    made = make(kind, signature.heads, signature.kv_heads, signature.head_dim, **options)
    assert made.signature == signature
    for example in examples("attention", signature):
        out = made(*(torch.from_numpy(array) for array in example.inputs.values()))
        tolerance = find_op("attention").tolerance(signature)
        assert compare_all({"out": out.numpy()}, example.expected, tolerance).complaint is None


def decoding(sequences: int = 3, pages: int = 6, table_pages: int = 4) -> list[torch.Tensor]:
    """Tensors of a call of 2 heads on 1, pages of 4 tokens."""
    return [
        torch.randn(sequences, 2, 16),
        torch.randn(pages, 1, 4, 16),
        torch.randn(pages, 1, 4, 16),
        torch.arange(sequences * table_pages, dtype=torch.int32).view(sequences, table_pages) % pages,
        torch.tensor([16, 1, 9][:sequences], dtype=torch.int32),
    ]


@pytest.mark.parametrize(
    ("position", "change", "said"),
    [
        (4, [16, 0, 9], "lengths[1] is 0; expected a length from 1 to 16 (table_pages * 4 = 16)"),
        (4, [16, -3, 9], "lengths[1] is -3"),
        (4, [17, 1, 9], "lengths[0] is 17"),
        (3, (2, 2, 6), "block_table[2, 2] is 6; expected a page from 0 to 5 (pages = 6); the row's lengths needs it"),
        (3, (1, 0, -1), "block_table[1, 0] is -1"),
        (0, torch.zeros(3, 2, 8), "q has shape [3, 2, 8]; expected [tokens, 2, 16]"),
        (0, torch.zeros(4, 2, 16), "block_table has shape [3, 4]; expected [tokens, table_pages] with tokens = 4"),
        (2, torch.zeros(5, 1, 4, 16), "v_cache has shape [5, 1, 4, 16]"),
        (0, np.zeros((3, 2, 16), np.float32), "it has type ndarray"),
        (4, torch.tensor([1, 1, 1]), "lengths has dtype torch.int64"),
    ],
)
def test_what_would_lead_a_decode_astray_is_refused(position: int, change: Any, said: str) -> None:
    tensors: list[Any] = decoding()
    if isinstance(change, tuple):
        row, column, value = change
        tensors[position][row, column] = value
    elif isinstance(change, list):
        tensors[position] = torch.tensor(change, dtype=torch.int32)
    else:
        tensors[position] = change
    with pytest.raises(TilewrightError) as caught:
        make(PagedDecode, 2, 1, 16, page_size=4)(*tensors)
    assert said in str(caught.value)
    assert str(caught.value).startswith("attention decode: ")


def test_pages_that_are_not_in_use_may_be_anything() -> None:
    decode, tensors = make(PagedDecode, 2, 1, 16, page_size=4), decoding()
    expected = decode(*tensors)
    tensors[3][1, 1:] = 99
    tensors[3][2, 3] = -1
    assert torch.equal(decode(*tensors), expected)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        (
            [0, 3, 3, 5],
            "cu_seqlens[2] is 3; expected offsets that start at 0, rise with every sequence, and end at tokens",
        ),
        ([0, 4, 3, 5], "cu_seqlens[2] is 3"),
        ([1, 3, 5], "cu_seqlens[0] is 1"),
        (
            [0, 3, 4],
            "cu_seqlens[2] is 4; expected offsets that start at 0, rise with every sequence, and end at tokens = 5",
        ),
        ([], "cu_seqlens is empty; expected offsets"),
    ],
)
def test_offsets_that_do_not_rise_are_refused(offsets: list[int], said: str) -> None:
    q, k = torch.randn(5, 2, 16), torch.randn(5, 1, 16)
    with pytest.raises(TilewrightError) as caught:
        make(VarlenPrefill, 2, 1, 16)(q, k, k.clone(), torch.tensor(offsets, dtype=torch.int32))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("sinks", "said"),
    [
        (torch.zeros(3), "sinks has shape [3]; expected [2]"),
        (torch.zeros(2).double(), "must be a torch.float32 tensor [2] on the CPU or a GPU"),
        (torch.tensor([0.0, torch.inf]), "sinks holds NaN or an infinity"),
    ],
)
def test_sinks_that_do_not_fit_are_refused(sinks: torch.Tensor, said: str) -> None:
    for kind in (PagedDecode, VarlenPrefill):
        with pytest.raises(TilewrightError) as caught:
            make(kind, 2, 1, 16, sinks=sinks)
        assert said in str(caught.value)


def test_nothing_to_compute_is_no_mistake() -> None:
    cache, none = torch.randn(2, 1, 4, 16), torch.empty(0, 2, 16)
    table, lengths = torch.empty(0, 3, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    assert make(PagedDecode, 2, 1, 16, page_size=4)(none, cache, cache.clone(), table, lengths).shape == (0, 2, 16)
    prefill, k = make(VarlenPrefill, 2, 1, 16), torch.empty(0, 1, 16)
    assert prefill(none, k, k.clone(), torch.zeros(1, dtype=torch.int32)).shape == (0, 2, 16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0, 1, 7]),
    st.booleans(),
    st.sampled_from(["hnd", "nhd"]),
    st.integers(0, 999),
)
def test_the_last_token_of_a_prompt_is_what_decoding_gives(
    page_size: int, lengths: list[int], group: int, window: int, sinks: bool, kv_layout: str, seed: int
) -> None:
    """Any paging of the same keys and values gives the same result."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim = 2 * group, 2, 16
    learned = torch.randn(heads, generator=generator) if sinks else None
    q = torch.randn(sum(lengths), heads, dim, generator=generator)
    k, v = (torch.randn(sum(lengths), kv_heads, dim, generator=generator) for _ in "kv")
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int()
    whole = make(VarlenPrefill, heads, kv_heads, dim, window=window, sinks=learned)(q, k, v, offsets)

    used = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(used) + 1, generator=generator).int()
    table = torch.full((len(lengths), max(used) + 1), 1 << 20, dtype=torch.int32)
    caches = [torch.full((len(order), page_size, kv_heads, dim), torch.nan) for _ in "kv"]
    taken = 0
    for row, (end, length, pages) in enumerate(zip(ends.tolist(), lengths, used, strict=True)):
        table[row, :pages] = order[taken : taken + pages]
        taken += pages
        for token in range(length):
            page = table[row, token // page_size]
            for cache, source in zip(caches, (k, v), strict=True):
                cache[page, token % page_size] = source[end - length + token]
    if kv_layout == "hnd":
        caches = [cache.transpose(1, 2).contiguous() for cache in caches]
    decode = make(
        PagedDecode,
        heads,
        kv_heads,
        dim,
        page_size=page_size,
        kv_layout=kv_layout,
        window=window,
        sinks=learned,
    )
    last = decode(q[ends - 1], *caches, table, torch.tensor(lengths, dtype=torch.int32))
    torch.testing.assert_close(last, whole[ends - 1], rtol=1e-5, atol=1e-5)
