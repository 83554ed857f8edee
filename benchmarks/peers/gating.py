"""MoE routing as torch users write it: softmax and top-k in either order, and DeepSeek-V3's groups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peers import Call, Peer

Chosen = tuple[Tensor, Tensor]
"""Ids int64 or int32, and weights, both [tokens, top_k]."""


@dataclass(frozen=True)
class Routing:
    """Logits to route, and how."""

    logits: Tensor
    top_k: int
    groups: int = 1
    top_groups: int = 1
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def bytes_moved(self) -> float:
        return 4.0 * (self.logits.numel() + 2 * self.logits.shape[0] * self.top_k)


def make_cases(experts: int, top_k: int, tokens: int, count: int, *, grouped: bool) -> list[Routing]:
    generator = torch.Generator().manual_seed(0)
    options = {"groups": 8, "top_groups": 4, "scale": 2.5} if grouped else {}
    bias = 0.05 * torch.randn(experts, generator=generator) if grouped else None
    cases = []
    for _ in range(count):
        drawn = Routing(torch.randn(2 * tokens, experts, generator=generator), top_k, bias=bias, **options)
        cases.append(replace(drawn, logits=drawn.logits[clear_choices(drawn)][:tokens].contiguous()))
    return cases


def clear_choices(case: Routing, tries: int = 8) -> Tensor:
    """Bool [tokens]: whether a token picks the same experts where logits are rounded otherwise, as programs do."""
    generator = torch.Generator().manual_seed(1)
    picked, same = reference(case) > 0, torch.ones(case.logits.shape[0], dtype=torch.bool)
    for _ in range(tries):
        noise = 1e-5 * torch.randn(case.logits.shape, generator=generator)
        same &= ((reference(replace(case, logits=case.logits + noise)) > 0) == picked).all(dim=1)
    return same


def softmax_then_topk(case: Routing) -> Chosen:
    weights, ids = torch.softmax(case.logits, dim=-1).topk(case.top_k, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True)


def topk_then_softmax(case: Routing) -> Chosen:
    logits, ids = case.logits.topk(case.top_k, dim=-1)
    return ids, torch.softmax(logits, dim=-1)


def unsorted_topk_then_softmax(case: Routing) -> Chosen:
    """An engine does not mind the order of a token's experts; torch saves the sort."""
    logits, ids = torch.topk(case.logits, case.top_k, dim=-1, sorted=False)
    return ids, torch.softmax(logits, dim=-1)


def sigmoid_groups(case: Routing, sort: bool = True) -> Chosen:
    scores = case.logits.sigmoid()
    keys = (scores + case.bias).view(scores.shape[0], case.groups, -1)
    best = keys.topk(2, dim=-1, sorted=False).values.sum(dim=-1).topk(case.top_groups, dim=-1, sorted=False).indices
    outside = torch.ones(best.shape[0], case.groups, dtype=torch.bool).scatter_(1, best, False)
    ids = keys.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(case.top_k, dim=-1, sorted=sort).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(dim=-1, keepdim=True) * case.scale


def unsorted_sigmoid_groups(case: Routing) -> Chosen:
    return sigmoid_groups(case, sort=False)


def dense(case: Routing, chosen: Chosen) -> Tensor:
    """Weights [tokens, experts], 0 for experts that were not chosen: the same whatever the order."""
    ids, weights = chosen
    return torch.zeros(case.logits.shape, dtype=torch.float64).scatter_(1, ids.long(), weights.double())


def reference(case: Routing) -> Tensor:
    exact = Routing(
        case.logits.double(),
        case.top_k,
        case.groups,
        case.top_groups,
        None if case.bias is None else case.bias.double(),
        case.scale,
    )
    return dense(case, softmax_then_topk(exact) if case.bias is None else sigmoid_groups(exact))


def _peer(name: str, route: Callable[[Routing], Chosen]) -> Peer[Routing]:
    def prepare(cases: Sequence[Routing], _threads: int) -> list[Call]:
        return [lambda case=case: route(case) for case in cases]

    return Peer(name, prepare, in_row_order=dense)


SOFTMAX_PEERS = (
    _peer("torch softmax, topk", softmax_then_topk),
    _peer("torch topk, softmax", topk_then_softmax),
    _peer("torch unsorted topk", unsorted_topk_then_softmax),
)
GROUP_PEERS = (
    _peer("torch groups", sigmoid_groups),
    _peer("torch unsorted groups", unsorted_sigmoid_groups),
)
