"""Peers for the grouped GEMM: rows of x, gathered by ``row_token`` and sorted by expert, times the experts' weights.

Every call gathers its rows itself, as our kernel does, and reads the routing anew, as a server must.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from peers import Call, Peer, packed_once
from peers.ggml_peer import GgmlExperts
from peers.ggml_peer import why_not as ggml_why_not


@dataclass(frozen=True)
class GroupedGemm:
    """One batch: out[r] = w[e] @ x[row_token[r]] for the rows r from expert_offsets[e] to expert_offsets[e + 1].

    x [tokens, hidden] and w [experts, inter, hidden] are fp32, row_token [rows] and expert_offsets [experts + 1] int32.
    """

    x: Tensor
    w: Tensor
    row_token: Tensor
    expert_offsets: Tensor

    @property
    def flops(self) -> int:
        return 2 * len(self.row_token) * self.w.shape[1] * self.w.shape[2]

    @property
    def bytes_moved(self) -> int:
        """The least that must be read and written: the active experts' weights, x once, the output once."""
        _, inter, hidden = self.w.shape
        active = int((self.expert_offsets.diff() > 0).sum())
        return self.x.element_size() * (active * inter * hidden + self.x.numel() + len(self.row_token) * inter)

    @cached_property
    def row_token_long(self) -> Tensor:
        return self.row_token.long()  # the index type torch prefers; the conversion is not counted against it

    @cached_property
    def row_of_choice(self) -> Tensor:
        """[tokens, top_k]: the row that holds each token's j-th expert."""
        return torch.argsort(self.row_token_long, stable=True).view(len(self.x), -1)

    @cached_property
    def expert_ids(self) -> Tensor:
        """[tokens, top_k] int32: each token's experts."""
        experts = torch.repeat_interleave(torch.arange(len(self.w), dtype=torch.int32), self.expert_offsets.diff())
        return experts[self.row_of_choice]

    def poisoned_output(self) -> Tensor:
        return torch.full((len(self.row_token), self.w.shape[1]), torch.nan)


def reference(case: GroupedGemm) -> Tensor:
    """The result in fp64."""
    rows = case.x.double().index_select(0, case.row_token_long)
    return torch.cat([rows[a:b] @ case.w[e].double().T for e, a, b in _segments(case.expert_offsets)])


def make_cases(
    *, experts: int, top_k: int, hidden: int, inter: int, tokens: int, exceed_bytes: int, seed: int = 0
) -> list[GroupedGemm]:
    """Batches of equal work whose weights together exceed ``exceed_bytes`` (give three times the last-level cache).

    One balanced random routing is drawn. The batches relabel its experts, so that their active experts differ as far as
    possible; where all experts of a weight tensor have had their turn, the next tensor follows.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    by_use = torch.bincount(ids.flatten(), minlength=experts).argsort(descending=True)
    rank = torch.empty_like(by_use).scatter_(0, by_use, torch.arange(experts))[ids]  # the most used expert is number 0
    active = int(rank.max()) + 1
    shifts = range(0, experts - active + 1, active)
    tensors = -(-exceed_bytes // (experts * inter * hidden * 4))
    cases = []
    for _ in range(tensors):
        w = torch.randn(experts, inter, hidden, generator=generator) * hidden**-0.5
        for shift in shifts:
            flat = (rank + shift).flatten()
            row_token = (flat.argsort(stable=True) // top_k).int()
            expert_offsets = F.pad(torch.bincount(flat, minlength=experts).cumsum(0), (1, 0)).int()
            x = torch.randn(tokens, hidden, generator=generator)
            cases.append(GroupedGemm(x, w, row_token, expert_offsets))
    return cases


def _segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every expert that has rows."""
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(offsets.tolist())) if a < b]


def _torch_loop(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    def call_for(case: GroupedGemm) -> Call:
        out, weights = case.poisoned_output(), list(case.w)

        def call() -> Tensor:
            for e, a, b in _segments(case.expert_offsets):
                out[a:b] = F.linear(case.x.index_select(0, case.row_token_long[a:b]), weights[e])
            return out

        return call

    return [call_for(case) for case in cases]


def _torch_mm_out(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    """The loop without its temporaries: one gather, and products written in place."""

    def call_for(case: GroupedGemm) -> Call:
        out, weights = case.poisoned_output(), [w.t() for w in case.w]
        rows = torch.empty(len(case.row_token), case.x.shape[1])

        def call() -> Tensor:
            torch.index_select(case.x, 0, case.row_token_long, out=rows)
            for e, a, b in _segments(case.expert_offsets):
                torch.mm(rows[a:b], weights[e], out=out[a:b])
            return out

        return call

    return [call_for(case) for case in cases]


def _grouped_mm(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    """Weights as models store them, seen through their transpose."""
    return [_grouped_mm_call(case, case.w.transpose(1, 2)) for case in cases]


def _grouped_mm_kn(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    """Weights copied once into [experts, hidden, inter]: the faster layout for few tokens."""
    packs = packed_once(cases, lambda case: case.w, lambda w: w.transpose(1, 2).contiguous())
    return [_grouped_mm_call(case, weights) for case, weights in zip(cases, packs, strict=True)]


def _grouped_mm_call(case: GroupedGemm, weights: Tensor) -> Call:
    ends = case.expert_offsets[1:]
    return lambda: F.grouped_mm(case.x.index_select(0, case.row_token_long), weights, offs=ends)


def _numpy(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    def call_for(case: GroupedGemm) -> Call:
        out = case.poisoned_output()
        x, y, weights = case.x.numpy(), out.numpy(), [w.T for w in case.w.numpy()]
        row_token = case.row_token_long.numpy()
        rows = np.empty((len(row_token), x.shape[1]), np.float32)

        def call() -> Tensor:
            np.take(x, row_token, axis=0, out=rows, mode="clip")  # clip: other modes buffer the output
            for e, a, b in _segments(case.expert_offsets):
                np.dot(rows[a:b], weights[e], out=y[a:b])
            return out

        return call

    return [call_for(case) for case in cases]


# The row count that inductor-style packing is optimised for; other counts stay correct, and here as fast.
_ONEDNN_PACKED_FOR_ROWS = 16


def _onednn_packed(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    """The loop over weights in oneDNN's own blocked layout, as torch.compile's freezing uses it."""

    def pack(w: Tensor) -> list[Tensor]:
        return [torch.ops.mkldnn._reorder_linear_weight(each, _ONEDNN_PACKED_FOR_ROWS) for each in w]  # noqa: SLF001

    linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001

    def call_for(case: GroupedGemm, weights: list[Tensor]) -> Call:
        out = case.poisoned_output()

        def call() -> Tensor:
            rows = case.x.index_select(0, case.row_token_long)
            for e, a, b in _segments(case.expert_offsets):
                out[a:b] = linear(rows[a:b], weights[e], None, "none", [], "")
            return out

        return call

    packs = packed_once(cases, lambda case: case.w, pack)
    return [call_for(case, weights) for case, weights in zip(cases, packs, strict=True)]


def _mkl_packed(cases: Sequence[GroupedGemm], _threads: int) -> list[Call]:
    """The loop over weights packed by MKL for each expert's own row count, which no server could know beforehand."""

    def call_for(case: GroupedGemm) -> Call:
        out, plain = case.poisoned_output(), list(case.w)
        packed = {
            e: torch.ops.mkl._mkl_reorder_linear_weight(plain[e], b - a)  # noqa: SLF001
            for e, a, b in _segments(case.expert_offsets)
        }
        linear = torch.ops.mkl._mkl_linear  # noqa: SLF001

        def call() -> Tensor:
            rows = case.x.index_select(0, case.row_token_long)
            for e, a, b in _segments(case.expert_offsets):
                out[a:b] = linear(rows[a:b], packed[e], plain[e], None, b - a)
            return out

        return call

    return [call_for(case) for case in cases]


def _ggml(cases: Sequence[GroupedGemm], threads: int) -> list[Call]:
    """ggml's ``mul_mat_id``. It groups the tokens by expert itself; x and the expert ids are already in its tensors."""
    packs = packed_once(cases, lambda case: case.w, GgmlExperts)
    return [experts.bind(case.x, case.expert_ids, threads) for case, experts in zip(cases, packs, strict=True)]


def _ggml_rows(case: GroupedGemm, output: Tensor) -> Tensor:
    """ggml's output is ordered by token, then by choice."""
    return torch.empty_like(output).index_copy_(0, case.row_of_choice.flatten(), output)


_NO_ONEDNN = "" if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"
_NO_MKL = "" if torch.backends.mkl.is_available() else "this torch was built without MKL"
_NO_GROUPED_MM = "" if hasattr(F, "grouped_mm") else "this torch has no grouped_mm"

PEERS: tuple[Peer[GroupedGemm], ...] = (
    Peer("torch_loop", _torch_loop),
    Peer("torch_mm_out", _torch_mm_out),
    Peer("grouped_mm", _grouped_mm, _NO_GROUPED_MM),
    Peer("grouped_mm_kn", _grouped_mm_kn, _NO_GROUPED_MM),
    Peer("numpy", _numpy),
    Peer("onednn_packed", _onednn_packed, _NO_ONEDNN),
    Peer("mkl_packed", _mkl_packed, _NO_MKL),
    Peer("ggml", _ggml, ggml_why_not(), _ggml_rows),
)
