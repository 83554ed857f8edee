"""What kind of experts a traced call is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tilewright.codegen.models.inspection.refusal import Refusal
from tilewright.codegen.models.inspection.tracing import ExpertsCall, follows_interface
from tilewright.codegen.models.parts import Activation
from tilewright.codegen.numbers.gates import join_halves

_PROBED_ROWS, _PROBED_COLUMNS = 64, 32
_GATED: tuple[Activation, ...] = get_args(Activation)


def read_experts(call: ExpertsCall, block: nn.Module) -> dict[str, Any] | Refusal:
    """Fields of ``ExpertLayers`` but for ``calls``, or why no template computes it.

    Args:
        call: of the experts.
        block: that called them.

    """
    module: Any = call.module
    own = _OWN.get(type(module).__name__)
    if follows_interface(module):
        read = _by_interface(module)
    elif own is not None:
        read = own(module)
    else:
        return Refusal(f"{type(module).__name__} does not follow Transformers' interface of experts, and is not known")
    if isinstance(read, Refusal):
        return read
    experts, inter, hidden, bias, activation = read
    top_k = call.top_k or getattr(block, "top_k", None)
    if hidden != call.hidden or not isinstance(top_k, int):
        return Refusal(f"{type(module).__name__} is called in a way that is not known")
    return {
        "hidden": hidden,
        "inter": inter,
        "experts": experts,
        "top_k": top_k,
        "activation": activation,
        "bias": bias,
    }


_Read = tuple[int, int, int, bool, Activation]
"""Experts, columns between their matrices, elements of a token, whether there is a bias, how gate and up are joined."""


def _by_interface(module: Any) -> _Read | Refusal:
    name = type(module).__name__
    if not module.has_gate or not isinstance(getattr(module, "gate_up_proj", None), Tensor):
        act = _name_of(module)
        return Refusal(f"{name} has no gate ({act} alone), and kernels join a gate and an up half")
    if getattr(module, "has_post_expert_norm", False):
        return Refusal(f"{name} is followed by a norm for each expert")
    experts, rows, hidden = module.gate_up_proj.shape
    if module.is_transposed:
        rows, hidden = hidden, rows
    inter = rows // 2
    down = (experts, inter, hidden) if module.is_transposed else (experts, hidden, inter)
    if rows % 2 or tuple(module.down_proj.shape) != down:
        return Refusal(f"{name} has weights {list(module.gate_up_proj.shape)} and {list(module.down_proj.shape)}")
    joined = _recognised(module._apply_gate)  # noqa: SLF001 - the interface's own name
    if joined is None:
        return Refusal(f"{name} joins gate and up as none of {', '.join(_GATED)}{_limits(module)}")
    return experts, inter, hidden, bool(module.has_bias), joined


def _recognised(apply_gate: Callable[[Tensor], Any]) -> Activation | None:
    """By what the module's own gate computes; names tell nothing. Values reach beyond where activations clamp."""
    columns = torch.randn((_PROBED_ROWS, _PROBED_COLUMNS), generator=torch.Generator().manual_seed(0)) * 6
    try:
        with torch.no_grad():
            joined = apply_gate(columns)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None
    half = _PROBED_COLUMNS // 2
    orders = (columns[:, :half], columns[:, half:]), (columns[:, ::2], columns[:, 1::2])
    if not isinstance(joined, Tensor) or joined.device.type != "cpu" or joined.shape != orders[0][0].shape:
        return None
    for activation in _GATED:
        for gate, up in orders:
            if torch.allclose(joined.float(), join_halves(activation, gate, up), rtol=1e-5, atol=1e-5):
                return activation
    return None


def _by_function(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """``function(gate) * up`` by what the function computes."""
    return _recognised(lambda columns: function(columns.chunk(2, dim=-1)[0]) * columns.chunk(2, dim=-1)[1])


def _llama4(module: Any) -> _Read | Refusal:
    experts, hidden, rows = module.gate_up_proj.shape
    return _known(module, experts, rows // 2, hidden, module.act_fn)


def _dbrx(module: Any) -> _Read | Refusal:
    rows, hidden = module.mlp.w1.shape
    return _known(module, module.num_experts, rows // module.num_experts, hidden, module.mlp.activation_fn)


def _longcat(module: Any) -> _Read | Refusal:
    experts, hidden, inter = module.down_proj.shape  # gate_up_proj has rows for the experts that do nothing, too
    return _known(module, experts, inter, hidden, module.act_fn)


def _known(
    module: nn.Module, experts: int, inter: int, hidden: int, function: Callable[[Tensor], Tensor]
) -> _Read | Refusal:
    activation = _by_function(function)
    if activation is None:
        return Refusal(f"{type(module).__name__} has an activation that is none of {', '.join(_GATED)}")
    return experts, inter, hidden, False, activation


_OWN: Mapping[str, Callable[[Any], _Read | Refusal]] = {
    "Llama4TextExperts": _llama4,
    "DbrxExperts": _dbrx,
    "LongcatFlashExperts": _longcat,
}
"""Classes with a forward of their own, each held against what it computes by tests/contract/test_model_classes.py."""


def _name_of(module: Any) -> str:
    function = getattr(module, "act_fn", None)
    config = getattr(module, "config", None)
    named = [getattr(config, name, None) for name in ("mlp_hidden_act", "hidden_act", "hidden_activation")]
    return next((name for name in named if isinstance(name, str)), type(function).__name__)


def _limits(module: Any) -> str:
    """What the config says of limits, which is what usually makes the difference."""
    config = getattr(module, "config", None)
    limit = getattr(config, "swiglu_limit", None)
    return "" if limit is None else f"; 'swiglu_limit' is {limit}"
