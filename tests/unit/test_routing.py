"""Routing: what every kind of it promises, the token order as a permutation, and what is refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tilewright.codegen.routing.spec import (
    DEFAULT_ALPHA,
    RoutingSpec,
    generate_topk_ids,
    generate_topk_weights,
    sort_tokens,
)
from tilewright.errors import TilewrightError

BALANCED = RoutingSpec("balanced")
SKEWED = RoutingSpec("power-law", alpha=DEFAULT_ALPHA)
IDS = np.array([[3, 1], [0, 2], [4, 3]], np.int32)

seeds = st.integers(0, 2**32)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """tokens, experts, top_k"""
    experts = draw(st.integers(1, 40))
    return draw(st.integers(1, 60)), experts, draw(st.integers(1, experts))


@st.composite
def picks(draw: st.DrawFn) -> tuple[NDArray[np.int32], int]:
    """Any ids that a sort must accept, with duplicates and -1, and the number of experts."""
    experts, tokens, top_k = draw(st.integers(1, 12)), draw(st.integers(0, 30)), draw(st.integers(1, 5))
    flat = draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    return np.array(flat, np.int32).reshape(tokens, top_k), experts


# --- the spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("balanced", BALANCED),
        ("power-law", SKEWED),
        ("power-law:1.5", RoutingSpec("power-law", alpha=1.5)),
        ("power-law:0", RoutingSpec("power-law", alpha=0.0)),
        ("recorded:ids.npy", RoutingSpec("recorded", path="ids.npy")),
        ("recorded:C:/a b.csv", RoutingSpec("recorded", path="C:/a b.csv")),
    ],
)
def test_parse(text: str, spec: RoutingSpec) -> None:
    assert RoutingSpec.parse(text) == spec
    assert RoutingSpec.parse(str(spec)) == spec


@given(st.floats(0, 100))
def test_any_skew_survives_its_text(alpha: float) -> None:
    spec = RoutingSpec("power-law", alpha=alpha)
    assert RoutingSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform", "unknown routing 'uniform'; give balanced"),
        ("", "unknown routing ''"),
        ("balanced:3", "unknown routing 'balanced:3'"),
        ("power-law:", "skew of power-law routing is ''"),
        ("power-law:steep", "skew of power-law routing is 'steep'"),
        ("power-law:-1", r"skew of power-law routing is -1\.0"),
        ("power-law:nan", "skew of power-law routing is nan"),
        ("power-law:inf", "skew of power-law routing is inf"),
        ("recorded", "needs a file"),
        ("recorded:", "needs a file"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(TilewrightError, match=message):
        RoutingSpec.parse(text)


def test_fields_of_another_kind_are_refused() -> None:
    with pytest.raises(TilewrightError, match="balanced routing takes no skew"):
        RoutingSpec("balanced", alpha=1.0)
    with pytest.raises(TilewrightError, match="power-law routing takes no file"):
        RoutingSpec("power-law", alpha=1.0, path="ids.npy")
    with pytest.raises(TilewrightError, match="unknown routing 'hash'"):
        RoutingSpec("hash")  # type: ignore[arg-type]


# --- generated ids


@given(st.sampled_from([BALANCED, SKEWED, RoutingSpec("power-law", alpha=100.0)]), sizes(), seeds)
def test_ids_are_distinct_in_range_and_fixed_by_the_seed(
    spec: RoutingSpec, size: tuple[int, int, int], seed: int
) -> None:
    tokens, experts, top_k = size
    ids = generate_topk_ids(spec, tokens, experts, top_k, seed)
    assert ids.dtype == np.int32
    assert ids.shape == (tokens, top_k)
    assert ids.min() >= 0
    assert ids.max() < experts
    assert all(len(set(row)) == top_k for row in ids.tolist())
    np.testing.assert_array_equal(ids, generate_topk_ids(spec, tokens, experts, top_k, seed))


@given(sizes(), seeds)
def test_balanced_counts_differ_by_one_at_most(size: tuple[int, int, int], seed: int) -> None:
    tokens, experts, top_k = size
    counts = np.bincount(generate_topk_ids(BALANCED, tokens, experts, top_k, seed).ravel(), minlength=experts)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3)])
def test_balanced_mixes_experts(experts: int, top_k: int) -> None:
    ids = generate_topk_ids(BALANCED, 2000, experts, top_k, seed=1)
    pairs = {tuple(sorted(row[:2])) for row in ids.tolist()}
    assert len(pairs) == experts * (experts - 1) // 2
    assert len(set(ids[:8, 0].tolist())) > 1


@pytest.mark.parametrize("spec", [BALANCED, SKEWED])
def test_another_seed_gives_other_ids(spec: RoutingSpec) -> None:
    assert (generate_topk_ids(spec, 64, 16, 2, seed=1) != generate_topk_ids(spec, 64, 16, 2, seed=2)).any()


def test_power_law_follows_its_exponent() -> None:
    ids = generate_topk_ids(RoutingSpec("power-law", alpha=1.5), 40_000, 16, 1, seed=3)
    counts = np.sort(np.bincount(ids.ravel(), minlength=16))[::-1]
    expected = np.arange(1, 17) ** -1.5
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), rtol=0.15)


def test_power_law_makes_other_experts_popular_with_another_seed() -> None:
    hottest = {int(np.bincount(generate_topk_ids(SKEWED, 500, 32, 2, seed).ravel()).argmax()) for seed in range(10)}
    assert len(hottest) > 3


def test_power_law_beyond_one_block_of_rows() -> None:
    ids = generate_topk_ids(SKEWED, 20_000, 4, 2, seed=0)
    assert (ids[:, 0] != ids[:, 1]).all()
    assert (np.bincount(ids[-1000:].ravel(), minlength=4) > 0).all()


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 8, 2), (4, 0, 1), (4, 8, 0), (4, 2, 3), (-1, 8, 2)])
def test_impossible_sizes_are_refused(tokens: int, experts: int, top_k: int) -> None:
    with pytest.raises(TilewrightError, match=f"cannot route {tokens} tokens to {top_k} of {experts} experts"):
        generate_topk_ids(BALANCED, tokens, experts, top_k, seed=0)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(TilewrightError, match="seed is -1"):
        generate_topk_ids(BALANCED, 4, 8, 2, seed=-1)


# --- recorded ids


def npy(header: str, data: bytes = b"") -> bytes:
    """A file of numpy's format with a header of one's own."""
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def write_ids(path: Path, ids: NDArray[np.int32]) -> None:
    match path.suffix:
        case ".npy":
            np.save(path, ids)
        case ".npz":
            if path.stem == "several":
                np.savez(path, topk_ids=ids, logits=np.zeros(3))
            else:
                np.savez_compressed(path, ids)
        case ".json":
            path.write_text(json.dumps({"topk_ids": ids.tolist()} if path.stem == "several" else ids.tolist()))
        case ".csv":
            path.write_text("".join(",".join(map(str, row)) + "\r\n" for row in ids.tolist()))
        case _:
            path.write_text("\n" + "\n  \n".join(" ".join(map(str, row)) for row in ids.tolist()))


@pytest.mark.parametrize(
    "name", ["ids.npy", "ids.npz", "several.npz", "ids.json", "several.json", "ids.csv", "ids.txt", "ids", "IDS.NPY"]
)
def test_recorded_ids_come_back_and_repeat(tmp_path: Path, name: str) -> None:
    write_ids(tmp_path / name.lower(), IDS)
    path = (tmp_path / name.lower()).rename(tmp_path / name)
    ids = generate_topk_ids(RoutingSpec.parse(f"recorded:{path}"), 7, 5, 2, seed=0)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, np.concatenate([IDS, IDS, IDS[:1]]))
    np.testing.assert_array_equal(generate_topk_ids(RoutingSpec("recorded", path=str(path)), 2, 5, 2, 9), IDS[:2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.csv", b"", r"holds float64 of shape \(0,\)"),
        ("ids.csv", b"0,1\n2\n", "does not hold one row of expert ids per token"),
        ("ids.csv", b"a,b\n0,1\n", "does not hold one row of expert ids per token"),
        ("ids.csv", b"0,1.5\n", "does not hold one row of expert ids per token"),
        ("ids.csv", b"0,1,2\n", "holds 3 ids per token, but the model picks 2"),
        ("ids.csv", b"0,1\n1,5\n", "token 1 picks expert 5, but ids go from 0 to 4"),
        ("ids.csv", b"0,1\n-1,2\n", "token 1 picks expert -1"),
        ("ids.csv", b"0,1\n3,3\n", r"token 1 picks the same expert twice: \[3, 3\]"),
        ("ids.csv", b"0,99999999999999999999999\n", "holds object"),
        ("ids.csv", b"\xff\xfe", "does not hold one row"),
        ("ids.json", b"[[0, 1], [2]]", "does not hold one row"),
        ("ids.json", b"[[0.0, 1.0]]", "holds float64"),
        ("ids.json", b"[0, 1]", r"shape \(2,\)"),
        ("ids.json", b"[[0, 1]", "does not hold one row"),
        ("ids.json", b'{"ids": [[0, 1]]}', "has no array named 'topk_ids'"),
        ("ids.npy", b"", "does not hold one row"),
        ("ids.npy", b"not numpy", "does not hold one row"),
        ("ids.npz", b"PK\x03\x04broken", "does not hold one row"),
        ("ids.npy", npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000, 2), }"), "it ends before"),
        ("ids.npy", npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-4, -2), }"), "does not hold one row"),
        ("ids.npy", npy("{'descr': '<i4', 'fortran_order': False, 'shape': (10**400, 2), }"), "does not hold one row"),
        ("ids.npy", npy(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({'9' * 400}, 2), }}"), "does not hold"),
        ("ids.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 2), }", b"cos\n."), "Python objects"),
        ("ids.npy", npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }"), "Python objects"),
        ("ids.npy", npy("{" + " " * 65000), "does not hold one row"),
        ("ids.npy", npy("[" * 5000), "does not hold one row"),
        ("ids.npy", b"\x93NUMPY\x02\x00" + (10 << 20).to_bytes(4, "little") + bytes(10 << 20), "does not hold one"),
        ("ids.npy", b"\x93NUMPY\x03\x00" + bytes(100), "it is in version"),
        ("ids.json", b"[" * 100_000, "does not hold one row"),
        ("ids.json", b"[[NaN, 1]]", "holds float64"),
        ("ids.json", b'{"topk_ids": {"a": [1]}}', r"holds object of shape \(\)"),
        ("ids.json", b"[[" + b"9" * 5000 + b", 1]]", "does not hold one row"),
        ("ids.txt", b"9" * 5000 + b" 1", "does not hold one row"),
        ("ids.txt", bytes(33 << 20), "it has 33 MiB, and at most 32 are read"),
    ],
)
def test_recorded_ids_that_do_not_fit_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TilewrightError, match=message) as caught:
        generate_topk_ids(RoutingSpec("recorded", path=str(path)), 4, 5, 2, seed=0)
    assert str(path) in str(caught.value)


def test_recorded_file_must_exist_and_hold_no_pickle(tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match=r"none\.npy' cannot be read \(No such file"):
        generate_topk_ids(RoutingSpec("recorded", path=str(tmp_path / "none.npy")), 4, 5, 2, seed=0)
    np.save(tmp_path / "pickled.npy", np.array([[{}, 1]], object), allow_pickle=True)
    with pytest.raises(TilewrightError, match="does not hold one row"):
        generate_topk_ids(RoutingSpec("recorded", path=str(tmp_path / "pickled.npy")), 4, 5, 2, seed=0)


@pytest.mark.parametrize("suffix", ["", ".npy", ".npz", ".json"])
def test_recorded_ids_in_what_is_no_file_are_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, said in (
        ("fifo", "it is a pipe or a device"),
        ("zero", "it is a pipe or a device"),
        ("folder", "Is a directory"),
    ):
        with pytest.raises(TilewrightError, match=rf"cannot be read \(.*{said}"):
            generate_topk_ids(RoutingSpec("recorded", path=str(tmp_path / f"{name}{suffix}")), 4, 5, 2, seed=0)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("topk_ids.npy", "w") as member,
    ):
        for _ in range(257):
            member.write(bytes(1 << 20))
    with pytest.raises(TilewrightError, match="its array has 269484032 bytes"):
        generate_topk_ids(RoutingSpec("recorded", path=str(path)), 4, 5, 2, seed=0)


def test_fortrans_order_is_read_as_what_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.asfortranarray(IDS))
    ids = generate_topk_ids(RoutingSpec("recorded", path=str(tmp_path / "ids.npy")), 3, 5, 2, seed=0)
    np.testing.assert_array_equal(ids, IDS)


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    np.savez_compressed(path, topk_ids=np.tile(IDS, (500, 1)))
    damaged = bytearray(path.read_bytes())
    damaged[60:90] = bytes(30)
    path.write_bytes(damaged)
    with pytest.raises(TilewrightError, match="does not hold one row"):
        generate_topk_ids(RoutingSpec("recorded", path=str(path)), 4, 5, 2, seed=0)


# --- weights


@given(sizes(), seeds)
def test_weights_are_a_softmax(size: tuple[int, int, int], seed: int) -> None:
    ids = np.zeros((size[0], size[2]), np.int32)
    whole, part = generate_topk_weights(ids, seed), generate_topk_weights(ids, seed, renormalize=False)
    assert whole.dtype == part.dtype == np.float32
    assert whole.shape == part.shape == ids.shape
    assert (whole > 0).all()
    assert (part > 0).all()
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
    assert (part.sum(axis=1) < 1).all()
    np.testing.assert_array_equal(whole, generate_topk_weights(ids, seed))


def test_weights_differ_between_tokens_and_seeds() -> None:
    weights = generate_topk_weights(IDS, seed=1)
    assert len(np.unique(weights)) == weights.size
    assert (weights != generate_topk_weights(IDS, seed=2)).all()


# --- token order


def test_order_of_a_small_batch() -> None:
    order = sort_tokens(np.array([[2, 0], [0, -1], [2, 0]], np.int32), experts=4)
    assert order.row_token.tolist() == [0, 1, 2, 0, 2]
    assert order.expert_offsets.tolist() == [0, 3, 3, 5, 5]
    assert order.slot_row.tolist() == [[3, 0], [1, -1], [4, 2]]


@given(picks())
def test_order_is_a_stable_permutation_of_the_local_picks(pick: tuple[NDArray[np.int32], int]) -> None:
    ids, experts = pick
    order = sort_tokens(ids, experts)
    rows = int((ids >= 0).sum())
    assert order.row_token.dtype == order.expert_offsets.dtype == order.slot_row.dtype == np.int32
    assert order.row_token.shape == (rows,)
    assert order.expert_offsets.shape == (experts + 1,)
    assert order.slot_row.shape == ids.shape
    assert (order.expert_offsets[0], order.expert_offsets[-1]) == (0, rows)
    assert (np.diff(order.expert_offsets) >= 0).all()
    np.testing.assert_array_equal(order.slot_row == -1, ids == -1)
    assert sorted(order.slot_row[ids >= 0].tolist()) == list(range(rows))

    for expert in range(experts):
        slots = np.argwhere(ids == expert)  # token by token, slot by slot: what stable means
        begin, end = order.expert_offsets[expert : expert + 2]
        assert order.row_token[begin:end].tolist() == slots[:, 0].tolist()
        assert order.slot_row[ids == expert].tolist() == list(range(begin, end))


def test_one_hot_expert_leaves_the_others_empty() -> None:
    order = sort_tokens(np.full((50, 1), 6, np.int32), experts=8)
    assert order.expert_offsets.tolist() == [0] * 7 + [50, 50]
    assert order.row_token.tolist() == list(range(50))


def test_one_token_and_no_token() -> None:
    assert sort_tokens(np.array([[5, 1, 3]]), experts=6).slot_row.tolist() == [[2, 0, 1]]
    empty = sort_tokens(np.empty((0, 2), np.int32), experts=3)
    assert empty.expert_offsets.tolist() == [0, 0, 0, 0]
    assert empty.slot_row.shape == (0, 2)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [2, 4], [9, 0]], "token 1 picks expert 4 in slot 1, but ids go from 0 to 3"),
        ([[0, 1], [-2, 9]], "token 1 picks expert -2 in slot 0"),
        ([0, 1], r"not int64 of shape \(2,\)"),
        ([[0.0, 1.0]], "not float64"),
    ],
)
def test_ids_out_of_range_or_form_are_refused(ids: list[object], message: str) -> None:
    with pytest.raises(TilewrightError, match=message):
        sort_tokens(np.array(ids), experts=4)


def test_ids_beyond_32_bits_are_not_wrapped_into_range() -> None:
    with pytest.raises(TilewrightError, match="picks expert 4294967296"):
        sort_tokens(np.array([[2**32]], np.int64), experts=4)


# --- expert parallelism


def local_ids(topk_ids: NDArray[np.int32], experts: int, rank: int) -> NDArray[np.int32]:
    """Picks as one rank of expert parallelism sees them: its experts count from 0, all others become -1."""
    local = topk_ids - np.int32(rank * experts)
    return np.where((local >= 0) & (local < experts), local, np.int32(-1))


@given(sizes(), st.integers(1, 4), seeds)
def test_every_pick_is_computed_by_exactly_one_rank(size: tuple[int, int, int], ep: int, seed: int) -> None:
    tokens, experts, top_k = size
    ids = generate_topk_ids(SKEWED, tokens, experts * ep, top_k, seed)
    of_rank = [local_ids(ids, experts, rank) for rank in range(ep)]
    assert sum(len(sort_tokens(local, experts).row_token) for local in of_rank) == tokens * top_k
    back = np.stack([np.where(local < 0, -1, local + rank * experts) for rank, local in enumerate(of_rank)])
    assert all(local.dtype == np.int32 for local in of_rank)
    np.testing.assert_array_equal((back >= 0).sum(axis=0), 1)
    np.testing.assert_array_equal(back.max(axis=0), ids)
