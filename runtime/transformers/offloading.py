"""Experts that a device map keeps in memory while the rest of the model is on a GPU.

Accelerate, which Transformers asks for that, leaves such a module without weights and hooks its forward, so that they
are brought to the GPU for every call and forgotten afterwards. Served experts compute where the weights are, and only
activations go to and fro: so their weights are read from where the hook has them, and calls go past it. What is used
of Accelerate is the attributes ``_hf_hook`` and ``_old_forward`` of a hooked module, and ``hooks``, ``offload`` and
``weights_map`` of hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_FORWARD = "forward"
_PAST = "_tilewright_hooked_forward"


def held_weight(module: nn.Module, name: str) -> Any:
    """The parameter ``name`` of ``module``, or where a hook has it, that; None where there is none."""
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.device.type != "meta":
        return weight
    for weights in _offloaded(module):
        try:
            return weights[name]
        except KeyError:
            continue
    return weight


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook brings the weights of ``module`` for every call."""
    return any(True for _ in _offloaded(module))


def go_past_hook(module: nn.Module) -> None:
    """Have calls of ``module`` reach its own forward, where a hook would bring weights for it."""
    if is_offloaded(module) and _FORWARD in vars(module):
        setattr(module, _PAST, vars(module)[_FORWARD])
        module.forward = module._old_forward  # type: ignore[assignment]  # noqa: SLF001 - Accelerate's name for it


def go_through_hook(module: nn.Module) -> None:
    """Undo :func:`go_past_hook`."""
    hooked = vars(module).pop(_PAST, None)
    if hooked is not None:
        module.forward = hooked


def _offloaded(module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Weights of ``module`` by name, as its hooks keep them."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            yield each.weights_map
