"""RMSNorm of a decoding step in one call: of a few rows, torch's own is a chain of small operators.

No kernel that is tuned: with so few rows, what counts is how much code runs, when weights have just swept the caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.transformers.recognition import Refusal
from tilewright.runtime.transformers.reports import LeftAlone
from tilewright.runtime.transformers.specialised import Specialised, agree, has_own_forward, random_rows, specialise
from tilewright.runtime.transformers.trial import Call

_MOST_ELEMENTS = 1 << 15
"""Of an input; beyond that torch's threads and vectors win."""


class RowsNorm(Specialised):
    """Serves fp32 on the CPU where no gradient is recorded."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
        """``hidden_states`` [..., n] over its root mean square, times ``weight``; as before with further arguments."""
        plain = not others and not named and isinstance(hidden_states, Tensor)
        if plain and not torch.compiler.is_compiling() and hidden_states.numel() <= _MOST_ELEMENTS:
            native, out = native_for_torch(), torch.empty_like(hidden_states)
            if native is not None and native.rms_norm(hidden_states, self.weight, self.variance_epsilon, out):
                return out
        return super().forward(hidden_states, *others, **named)  # type: ignore[misc]  # of the class mixed into


@torch.no_grad()
def serve_norms(model: nn.Module, calls: Mapping[str, Sequence[Call]]) -> tuple[tuple[str, ...], tuple[LeftAlone, ...]]:
    """Names of the modules of ``model`` that are an RMSNorm and run so from now on, and those that only look like one.

    Args:
        model: whose modules are looked at.
        calls: what a forward calls them with, by name.

    """
    served, left_alone = [], []
    for name, module in model.named_modules():
        if native_for_torch() is None or not _looks_like_one(module):
            continue
        refusal = _refusal(module, calls.get(name, ()))
        if refusal is None:
            specialise(module, RowsNorm)
            served.append(name)
        else:
            left_alone.append(LeftAlone(name, refusal.reason))
    return tuple(served), tuple(left_alone)


def _looks_like_one(module: Any) -> bool:
    parameters = list(module.named_parameters(recurse=False))
    if [name for name, _ in parameters] != ["weight"] or not isinstance(
        getattr(module, "variance_epsilon", None), float
    ):
        return False
    (_, weight) = parameters[0]
    return weight.dim() == 1 and weight.dtype is torch.float32 and weight.device.type == "cpu"


def _refusal(module: Any, calls: Sequence[Call]) -> Refusal | None:
    """Why ``module`` is not served as an RMSNorm of one tensor; None where it is one, in every call of a forward."""
    if has_own_forward(module):
        return Refusal("its norm's forward was replaced in the module itself")
    if not calls:
        return Refusal("the forward that it was tried in does not call its norm")
    if any(call.only_tensor is None for call in calls):
        return Refusal("its norm is called with more than the tensor to scale")
    tried: list[tuple[Tensor, Any]] = [(random_rows(2, module.weight.shape[0]), None)]
    tried += [(call.args[0], call.output) for call in calls]
    for x, output in tried:
        try:
            expected = module.forward(x) if output is None else output
        except Exception as error:
            return Refusal(f"its norm raises {type(error).__name__} for random rows")
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight
        if not agree(scaled, expected):
            return Refusal("its norm computes something else than an RMSNorm")
    return None
