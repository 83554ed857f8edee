"""One forward pass on the meta device, in which everything that an op may compute tells how it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tilewright.errors import TilewrightError

IMPLEMENTATION = "tilewright_inspection"
"""Name of the functions here in Transformers' registries."""
TOKENS = 7
"""Of the traced prompt: a number that is no other size of a model."""


@dataclass(frozen=True)
class AttentionCall:
    """A call of the attention function."""

    module: nn.Module
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    """Shapes, [batch, heads, tokens, dim]."""
    mask: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class ExpertsCall:
    """A call of a module of experts."""

    module: nn.Module
    hidden: int
    top_k: int | None
    """Experts of a token, where it is told which; None where it gets the rows of every expert."""


@dataclass
class Trace:
    """What a pass called."""

    model: Any
    attention: list[AttentionCall] = field(default_factory=list)
    experts: list[ExpertsCall] = field(default_factory=list)
    linears: Counter[nn.Linear] = field(default_factory=Counter)
    """Calls with a row for every token."""
    other_linears: Counter[nn.Linear] = field(default_factory=Counter)
    """Calls with fewer rows, or more."""
    called: Counter[nn.Module] = field(default_factory=Counter)
    arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """Of each module's last call."""
    names: dict[nn.Module, str] = field(default_factory=dict)

    def parent(self, module: nn.Module) -> nn.Module:
        """The module that holds ``module``."""
        parent: nn.Module = self.model.get_submodule(self.names[module].rpartition(".")[0])
        return parent

    def holds(self, outer: nn.Module, inner: nn.Module) -> bool:
        """Whether ``inner`` is ``outer`` or lies in it."""
        name = self.names[outer]
        return self.names[inner] == name or self.names[inner].startswith(f"{name}.")


_current: list[Trace] = []
"""The trace that is being made, if any."""


def trace(model: Any) -> Trace:
    """Run ``model``, which :func:`~.building.build` made for :data:`IMPLEMENTATION`, over a prompt.

    Raises:
        TilewrightError: when its forward depends on values, which the meta device does not have.

    """
    # On the CPU, for models look into it: nothing is padded. Others compute with it and with what has no values.
    masks = [torch.ones((1, TOKENS), dtype=torch.long, device=device) for device in ("cpu", "meta")]
    failures = []
    for mask in masks:
        found = Trace(model, names={module: name for name, module in model.named_modules()})
        error = _run(model, found, mask)
        # After the head nothing is called any more: some classes fail over how they pack up what they were given.
        if error is None or found.called[model.get_output_embeddings()]:
            return found
        failures.append(error)
    first = failures[0]
    said = next(iter(str(first).strip().splitlines()), "")[:200]
    raise TilewrightError(
        f"the forward of {type(model).__name__} cannot be followed without weights ({type(first).__name__}: {said})"
    ) from first


def _run(model: Any, found: Trace, attention_mask: Tensor) -> Exception | None:
    """One pass; what it failed with."""
    _current.append(found)
    try:
        with _hooks(model, found), _own_experts(model), _positions_without_values(model), torch.no_grad():
            model(
                input_ids=torch.zeros((1, TOKENS), dtype=torch.long, device="meta"),
                attention_mask=attention_mask,
                use_cache=False,
            )
    except Exception as error:
        return error
    finally:
        _current.pop()
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds routed experts: by Transformers' interface for them, or by the name of its class."""
    name = type(module).__name__
    return hasattr(module, "_apply_gate") or (name.endswith("Experts") and "Shared" not in name)


def follows_interface(module: nn.Module) -> bool:
    """Whether ``module`` calls the function that its config names."""
    return all(hasattr(module, each) for each in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))


@contextmanager
def _hooks(model: nn.Module, found: Trace) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.called[module] += 1
        found.arguments[module] = (args, kwargs)
        if type(module) is nn.Linear:
            rows = args[0].numel() // module.in_features if args else 0
            (found.linears if rows == TOKENS else found.other_linears)[module] += 1

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _NoLongPrompt(TorchFunctionMode):
    """Answers questions about the values of a tensor without any as for a short prompt."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


@contextmanager
def _positions_without_values(model: nn.Module) -> Iterator[None]:
    """Let rotary embeddings run that stretch with the length of the prompt, which they look up in positions.

    Their values differ by it, and never their shapes.
    """
    rotary = [module for module in model.modules() if "rotary" in type(module).__name__.lower()]
    for module in rotary:
        module.forward = _as_for_a_short_prompt(module.forward)
    try:
        yield
    finally:
        for module in rotary:
            del module.forward


def _as_for_a_short_prompt(forward: Callable[..., Any]) -> Callable[..., Any]:
    def short(*args: Any, **kwargs: Any) -> Any:
        with _NoLongPrompt():
            return forward(*args, **kwargs)

    return short


@contextmanager
def _own_experts(model: nn.Module) -> Iterator[None]:
    """Experts that do not call the function that their config names call it here, for they look at ids."""
    own = [module for module in model.modules() if is_experts(module) and not follows_interface(module)]
    for module in own:
        module.forward = _bound(module)
    try:
        yield
    finally:
        for module in own:
            del module.forward


def _bound(module: nn.Module) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: _experts(module, *args, **kwargs)


def _experts(module: nn.Module, x: Tensor, ids: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    _current[-1].experts.append(ExpertsCall(module, x.shape[-1], None if ids is None else ids.shape[-1]))
    return torch.empty_like(x)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    _current[-1].attention.append(AttentionCall(module, *shapes, attention_mask, options))
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[-1])), None


def _mask(
    *_: Any, q_length: int, kv_length: int, mask_function: Any, local_size: int | None = None, **__: Any
) -> Tensor:
    mask = torch.empty((1, 1, int(q_length), int(kv_length)), dtype=torch.bool, device="meta")
    mask.tilewright = (mask_function, local_size)  # type: ignore[attr-defined]  # attention is called with this tensor
    return mask


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
