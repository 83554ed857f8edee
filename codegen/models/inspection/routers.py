"""How a layer chooses experts, by trying: its own module runs on drawn numbers, and gating has to do the same.

Every parameter and buffer that the module has is drawn, so that a part which gating does not know makes a difference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from tilewright.codegen.models.inspection.refusal import Refusal
from tilewright.codegen.models.inspection.tracing import TOKENS
from tilewright.codegen.models.parts import Score
from tilewright.codegen.ops.gating.declaration import Gating
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.errors import TilewrightError

_TRIED_TOKENS = 96
_MOST_ELEMENTS = 1 << 28
"""Of the parameters that are drawn."""
_SPARE_TOKENS = 2
"""Tokens whose last choice may be a matter of rounding."""
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a module may raise that is run apart from its model."""


class _Choice(NamedTuple):
    ids: Tensor
    """[tokens, top_k]."""
    weights: Tensor


@dataclass(frozen=True)
class _Tried:
    """One run of a block."""

    x: Tensor
    """[tokens, hidden] as the block got it."""
    choice: _Choice
    matrices: tuple[Tensor, ...]
    """What may make logits."""
    vectors: tuple[Tensor, ...]
    """What may be a bias."""


class _CalledError(Exception):
    """The block called its experts."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.args_of_call = args


class _Catcher(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _CalledError((*args, *kwargs.values()))


class _Zero(nn.Module):
    """Stands for shared experts: as if they added nothing."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


def read_router(
    block: nn.Module, experts: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, Any] | Refusal:
    """Fields of ``RouterLayers`` but for ``calls``, or why gating does not compute it.

    Args:
        block: the module that calls ``experts``, on the meta device.
        experts: of it.
        arguments: that the block was called with.

    """
    try:
        tried = _try(block, experts, arguments)
    except _FAILURES as error:
        return Refusal(f"{type(block).__name__} cannot be tried by itself ({type(error).__name__})")
    if isinstance(tried, Refusal):
        return tried
    for signature, weights, logits in _candidates(tried, block):
        scale = _scale(tried, signature, weights, logits)
        if scale is not None:
            return {
                "experts": signature.experts,
                "top_k": signature.top_k,
                "score": signature.score,
                "renormalize": signature.renormalize,
                "bias": signature.bias,
                "groups": signature.groups,
                "top_groups": signature.top_groups,
                "scale": _as_written(scale, block),
            }
    return Refusal(
        f"{type(block).__name__} chooses in none of the ways of gating (softmax or sigmoid of logits; the best, also "
        "by "
        "groups or by a bias beside sigmoid; weights divided by their sum or not; one factor)"
    )


def _try(block: nn.Module, experts: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> _Tried | Refusal:
    clone = copy.deepcopy(block)
    for (name, own), (_, cloned) in zip(list(block.named_modules()), list(clone.named_modules()), strict=True):
        if own is experts or (name.rpartition(".")[2].startswith("shared") and name):
            parent = clone.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _Catcher() if own is experts else _Zero())
            del cloned
    held = [*clone.parameters(), *clone.buffers()]
    if sum(each.numel() for each in held) > _MOST_ELEMENTS:
        return Refusal(f"{type(block).__name__} is more than a router beside its experts")
    clone.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for each in (*clone.parameters(), *clone.buffers()):
        _draw(each.data, generator)
    args = tuple(_real(value, generator) for value in arguments[0])
    kwargs = {name: _real(value, generator) for name, value in arguments[1].items()}
    x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
    if x is None:
        return Refusal(f"{type(block).__name__} is called in a way that is not known")
    rows = x.reshape(-1, x.shape[-1]).clone()
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out: outputs.extend(_tensors(out))) for module in clone.modules()
    ]
    caught: tuple[Any, ...] = ()
    with torch.no_grad():
        try:
            clone(*args, **kwargs)
        except _CalledError as called:
            caught = called.args_of_call
    for handle in handles:
        handle.remove()
    choice = _choice(caught) or _dense_choice(outputs, len(rows))
    if choice is None:
        return Refusal(f"{type(block).__name__} does not tell its experts which tokens chose them")
    tensors = [each.data for each in (*clone.parameters(), *clone.buffers())]
    return _Tried(
        rows,
        choice,
        tuple(
            t for t in tensors if t.dim() == 2 and t.shape[1] == rows.shape[1] and t.shape[0] > int(choice.ids.max())
        ),
        tuple(t.flatten() for t in tensors if t.numel() > int(choice.ids.max()) and max(t.shape) == t.numel()),
    )


def _draw(values: Tensor, generator: torch.Generator) -> None:
    """Matrices that make numbers like one another; vectors about as large as scores."""
    if not values.is_floating_point():
        values.zero_()
    elif values.dim() > 1 and max(values.shape) < values.numel():
        values.normal_(0.0, values.shape[-1] ** -0.5, generator=generator)
    else:
        values.uniform_(0.1, 0.9, generator=generator)


def _real(value: Any, generator: torch.Generator) -> Any:
    """The like of an argument on the CPU, for more tokens."""
    if not isinstance(value, Tensor):
        return value
    shape = [_TRIED_TOKENS if size == TOKENS else size for size in value.shape]
    if not value.is_floating_point():
        return torch.zeros(shape, dtype=value.dtype)
    return torch.empty(shape, dtype=value.dtype).normal_(generator=generator)


def _tensors(out: Any) -> Iterator[Tensor]:
    for each in out if isinstance(out, tuple | list) else (out,):
        if isinstance(each, Tensor):
            yield each


def _choice(caught: tuple[Any, ...]) -> _Choice | None:
    """Ids and weights that experts were called with."""
    tensors = [each for each in caught[1:] if isinstance(each, Tensor)]
    ids = next((t for t in tensors if not t.is_floating_point()), None)
    weights = next((t for t in tensors if t.is_floating_point()), None)
    if ids is None or weights is None or ids.shape != weights.shape:
        return None
    return _Choice(ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1]))


def _dense_choice(outputs: list[Tensor], tokens: int) -> _Choice | None:
    """The same, where a module gives every expert a weight, most of them 0."""
    for out in outputs:
        if out.dim() == 2 and out.shape[0] == tokens and out.is_floating_point():
            chosen = (out != 0).sum(dim=1)
            top_k = int(chosen[0])
            if 0 < top_k < out.shape[1] and bool((chosen == top_k).all()):
                weights, ids = out.topk(top_k, dim=1)
                return _Choice(ids, weights)
    return None


def _candidates(tried: _Tried, block: nn.Module) -> Iterator[tuple[GatingSignature, dict[str, Any], Tensor]]:
    """Signatures that may be what was tried, with their weights and logits."""
    top_k = tried.choice.ids.shape[1]
    for matrix in tried.matrices:
        experts = matrix.shape[0]
        vectors = [vector for vector in tried.vectors if vector.numel() == experts]
        plain = tried.x.float() @ matrix.float().T
        for added in (None, *vectors):
            logits = plain if added is None else plain + added
            for bias in (None, *(vector for vector in vectors if vector is not added)):
                for groups, top_groups in _groups(block, experts):
                    for score in get_args(Score):
                        for renormalize in (True, False):
                            try:
                                signature = GatingSignature(
                                    experts=experts,
                                    top_k=top_k,
                                    score=score,
                                    renormalize=renormalize,
                                    bias=bias is not None,
                                    groups=groups,
                                    top_groups=top_groups,
                                )
                            except TilewrightError:
                                continue  # no gate has that
                            yield signature, {} if bias is None else {"bias": bias.numpy()}, logits


def _groups(block: nn.Module, experts: int) -> list[tuple[int, int]]:
    """Groups and how many of them are picked, as the module or its config may name them; none last."""
    holders: list[Any] = [block, *block.modules()]
    holders += [config for holder in holders if (config := getattr(holder, "config", None)) is not None]
    numbers = {
        value
        for holder in holders
        for name, value in vars(holder).items()
        if "group" in name and isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= experts
    }
    some = [(g, top) for g in sorted(numbers) for top in sorted(numbers) if g > 1 and top < g and experts % g == 0]
    return [*some, (1, 1)]


def _scale(tried: _Tried, signature: GatingSignature, weights: dict[str, Any], logits: Tensor) -> float | None:
    """The one factor by which the module's weights differ from those of ``signature``; None where they differ more."""
    expected = Gating().reference(signature, weights, {"logits": logits.numpy()})
    ids = torch.from_numpy(expected["topk_ids"]).long()
    own = torch.from_numpy(expected["topk_weights"]).double()
    theirs_ids, theirs = _by_id(tried.choice.ids.long(), tried.choice.weights.double())
    ids, own = _by_id(ids, own)
    same = (ids == theirs_ids).all(dim=1)
    if int((~same).sum()) > _SPARE_TOKENS:
        return None
    ratio = theirs[same] / own[same]
    scale = float(ratio.median())
    return scale if scale > 0 and bool(torch.allclose(ratio, torch.full_like(ratio, scale), rtol=1e-3)) else None


def _by_id(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    ordered, at = ids.sort(dim=1)
    return ordered, weights.gather(1, at)


def _as_written(scale: float, block: nn.Module) -> float:
    """The number that the config or the module writes down for a factor that was measured; 1 where it is none."""
    holders: list[Any] = [block, *block.modules()]
    holders += [config for holder in holders if (config := getattr(holder, "config", None)) is not None]
    written = {float(v) for h in holders for v in vars(h).values() if isinstance(v, float | int) and v > 0}
    near = [value for value in (1.0, *sorted(written)) if abs(value / scale - 1) < 1e-4]
    return near[0] if near else round(scale, 6)
