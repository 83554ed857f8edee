"""Attention as torch users write it. Keys and values lie as torch likes them best, which costs it nothing here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from peers import Call, Peer
from tilewright.codegen.ops.attention.declaration import AttentionProblem
from tilewright.codegen.ops.attention.inputs import gather_cache
from tilewright.codegen.ops.registry import find_op


@dataclass(frozen=True, eq=False)
class Case:
    """Tensors of one call as ours takes them, and the same for torch."""

    problem: AttentionProblem
    ours: Sequence[Tensor]
    q: Tensor
    """[sequences, heads, queries, head_dim]."""
    k: Tensor
    """[sequences, kv_heads, tokens, head_dim], contiguous: no pages to look up."""
    v: Tensor
    k_repeated: Tensor | None = None
    """``prefill``: [sequences, heads, tokens, head_dim]."""
    v_repeated: Tensor | None = None

    @cached_property
    def expected(self) -> Tensor:
        """fp64 [tokens, heads, head_dim]."""
        specs = self.problem.signature.tensors()
        arrays = {spec.name: each.numpy() for spec, each in zip(specs, self.ours, strict=False)}
        return torch.from_numpy(find_op("attention").reference(self.problem.signature, {}, arrays)["out"])

    @property
    def folded_q(self) -> Tensor:
        """[sequences, kv_heads, group, head_dim] of one query per sequence: the heads of a group as rows."""
        sequences, heads, _, dim = self.q.shape
        return self.q.view(sequences, self.k.shape[1], heads // self.k.shape[1], dim)


def make_cases(problem: AttentionProblem, count: int) -> list[Case]:
    return [_make_case(problem, seed) for seed in range(count)]


def _make_case(problem: AttentionProblem, seed: int) -> Case:
    signature = problem.signature
    inputs = find_op("attention").inputs(problem, seed)
    ours = [torch.from_numpy(array) for array in inputs.values()]
    if signature.stage == "prefill":
        q, k, v = (torch.from_numpy(inputs[name]).transpose(0, 1)[None].contiguous() for name in "qkv")
        repeated = (each.repeat_interleave(signature.group, dim=1) for each in (k, v))
        return Case(problem, ours, q, k, v, *repeated)
    rows = zip(inputs["block_table"], inputs["lengths"].tolist(), strict=True)
    gathered = [[gather_cache(signature, inputs[name], *row) for name in ("k_cache", "v_cache")] for row in rows]
    k, v = (torch.from_numpy(np.stack(each)).transpose(1, 2).contiguous() for each in zip(*gathered, strict=True))
    return Case(problem, ours, torch.from_numpy(inputs["q"])[:, :, None], k, v)


def _in_row_order(case: Case, out: Tensor) -> Tensor:
    """[tokens, heads, head_dim] of [sequences, heads, queries, head_dim], folded or not."""
    return out.reshape(case.q.shape).transpose(1, 2).flatten(0, 1)


def _repeated(tensor: Tensor, case: Case) -> Tensor:
    return tensor.repeat_interleave(case.problem.signature.group, dim=1)


def _products(case: Case) -> Tensor:
    scores = (case.folded_q * case.problem.signature.scale) @ case.k.transpose(2, 3)
    return torch.softmax(scores, dim=-1) @ case.v


def _peer(name: str, attend: Callable[[Case], Tensor]) -> Peer[Case]:
    def prepare(cases: Sequence[Case], _threads: int) -> list[Call]:
        return [lambda case=case: attend(case) for case in cases]

    return Peer(name, prepare, in_row_order=_in_row_order)


DECODE_PEERS = (
    _peer("sdpa, heads folded", lambda case: sdpa(case.folded_q, case.k, case.v)),
    _peer("sdpa, enable_gqa", lambda case: sdpa(case.q, case.k, case.v, enable_gqa=True)),
    _peer("sdpa, repeat_kv", lambda case: sdpa(case.q, _repeated(case.k, case), _repeated(case.v, case))),
    _peer("two products", _products),
)
PREFILL_PEERS = (
    _peer("sdpa, repeated before", lambda case: sdpa(case.q, case.k_repeated, case.v_repeated, is_causal=True)),
    _peer("sdpa, enable_gqa", lambda case: sdpa(case.q, case.k, case.v, is_causal=True, enable_gqa=True)),
)
