"""Expert weights of a Transformers module: how they lie, what they are joined by, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from tilewright.codegen.ops.moe_gemm.signature import Activation
from tilewright.runtime.torch.activations import activate
from tilewright.runtime.transformers.offloading import held_weight
from tilewright.runtime.transformers.specialised import random_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that widen to fp32 without loss, and that kernels for GPUs read."""
_DEVICES = ("cpu", "cuda")
_PROBED_ROWS = 64


@dataclass(frozen=True)
class Form:
    """How the weights of one module are declared."""

    activation: Activation
    interleaved: bool
    """Gate and up columns in turn; else all gates, then all ups."""
    transposed: bool
    """[experts, in, out]; else [experts, out, in]."""
    bias: bool
    dtype: torch.dtype
    device: torch.device
    experts: int
    inter: int
    hidden: int

    @property
    def served_dtype(self) -> torch.dtype:
        """In which weights and activations are served: their own on a GPU, fp32 on the CPU."""
        return self.dtype if self.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Refusal:
    """Why a module is left alone."""

    reason: str


class ExpertWeights(NamedTuple):
    """Arguments of :class:`tilewright.runtime.Experts`: fp32, on a GPU the weights in their own dtype."""

    w_up: Tensor
    w_down: Tensor
    bias_up: Tensor | None
    bias_down: Tensor | None


def read_form(module: nn.Module) -> Form | Refusal:
    """How ``module`` declares its weights, or why it cannot be served."""
    if not hasattr(type(module).forward, "__wrapped__"):
        return Refusal("its class replaces the forward that Transformers gave it")
    if not getattr(module, "has_gate", False) or not isinstance(held_weight(module, "gate_up_proj"), Tensor):
        return Refusal("its experts have no gate")
    if getattr(module, "has_post_expert_norm", False):
        return Refusal("its experts are followed by a norm")
    if getattr(module, "_is_expert_parallel", False):
        return Refusal("its experts are spread over several ranks")
    up, down = held_weight(module, "gate_up_proj"), held_weight(module, "down_proj")
    for weight in (up, down):
        if weight.device.type not in _DEVICES:
            return Refusal(f"its weights are on {weight.device}, and kernels run on CPUs and CUDA devices")
        if weight.device != up.device:
            return Refusal(f"its weights are on {up.device} and {weight.device}")
        if weight.dtype not in _DTYPES:
            return Refusal(f"its weights are {weight.dtype}; fp32, bf16 and fp16 are served")
    transposed, bias = bool(module.is_transposed), bool(module.has_bias)
    experts, rows, hidden = _declared(up, transposed).shape if up.dim() == 3 else (0, 0, 0)
    if rows == 0 or rows % 2 or tuple(_declared(down, transposed).shape) != (experts, hidden, rows // 2):
        return Refusal(f"its weights {list(up.shape)} and {list(down.shape)} are not those of gated experts")
    joined = _recognise_gate(module, rows // 2)
    if joined is None:
        return Refusal(f"its activation is none of {', '.join(_GATED)}")
    return Form(*joined, transposed, bias, up.dtype, up.device, experts, rows // 2, hidden)


def read_weights(module: nn.Module, form: Form) -> ExpertWeights:
    """The weights of ``module`` as :class:`tilewright.runtime.Experts` takes them: views where that is possible."""
    up, down = held_weight(module, "gate_up_proj").detach(), held_weight(module, "down_proj").detach()
    bias_up = held_weight(module, "gate_up_proj_bias").detach() if form.bias else None
    bias_down = held_weight(module, "down_proj_bias").detach() if form.bias else None
    w_up = _declared(up, form.transposed)
    return ExpertWeights(
        (_halved(w_up) if form.interleaved else w_up).to(form.served_dtype),
        _declared(down, form.transposed).to(form.served_dtype),
        None if bias_up is None else (_halved(bias_up) if form.interleaved else bias_up).float(),
        None if bias_down is None else bias_down.float(),
    )


def as_module_weights(weights: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """``gate_up_proj`` and ``down_proj`` of the module, from ``w_up`` and ``w_down``."""
    up = _in_turn(weights["w_up"]) if form.interleaved else weights["w_up"]
    return {
        "gate_up_proj": _declared(up, form.transposed).to(form.dtype).contiguous(),
        "down_proj": _declared(weights["w_down"], form.transposed).to(form.dtype).contiguous(),
    }


def _declared(weight: Tensor, transposed: bool) -> Tensor:
    """From the module's layout to [experts, out, in], or back."""
    return weight.transpose(1, 2) if transposed else weight


def _halved(rows: Tensor) -> Tensor:
    """Rows [experts, 2n, ...] that are gate and up in turn as all gates, then all ups."""
    return torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)


def _in_turn(rows: Tensor) -> Tensor:
    """The inverse of :func:`_halved`."""
    return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)


_GATED = tuple(name for name in get_args(Activation) if name != "none")
_ORDERS: Mapping[bool, Callable[[Tensor], Tensor]] = {
    False: lambda columns: columns,
    True: lambda columns: torch.cat((columns[:, ::2], columns[:, 1::2]), dim=1),
}


def _recognise_gate(module: nn.Module, inter: int) -> tuple[Activation, bool] | None:
    """Activation and whether columns are interleaved, by what the module's own gate computes; names tell nothing.

    The values reach beyond where activations clamp, and fill every column, so that no two of them agree.
    """
    columns = random_rows(_PROBED_ROWS, 2 * inter) * 6
    try:
        with torch.no_grad():
            joined = module._apply_gate(columns)  # type: ignore[operator]  # noqa: SLF001 - the interface's own name
    except Exception:
        return None
    if not isinstance(joined, Tensor) or joined.shape != (_PROBED_ROWS, inter):
        return None
    for activation in _GATED:
        for interleaved, order in _ORDERS.items():
            if torch.allclose(joined.float(), activate(order(columns), activation), rtol=1e-5, atol=1e-5):
                return activation, interleaved
    return None
