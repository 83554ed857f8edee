"""RMSNorm of a decoding step in one call: of a few rows, torch's own is a chain of small operators.

No kernel that is tuned: with so few rows, what counts is how much code runs, when weights have just swept the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.transformers.specialised import Specialised, agree, random_rows, specialise

_MOST_ELEMENTS = 1 << 15
"""Of an input; beyond that torch's threads and vectors win."""


class RowsNorm(Specialised):
    """Serves fp32 on the CPU where no gradient is recorded."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` [..., n] over its root mean square, times ``weight``."""
        if not torch.compiler.is_compiling() and hidden_states.numel() <= _MOST_ELEMENTS:
            native, out = native_for_torch(), torch.empty_like(hidden_states)
            if native is not None and native.rms_norm(hidden_states, self.weight, self.variance_epsilon, out):
                return out
        result: Tensor = super().forward(hidden_states)  # type: ignore[misc]  # of the class that this is mixed into
        return result


@torch.no_grad()
def serve_norms(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules of ``model`` that are an RMSNorm, and run so from now on."""
    served = []
    for name, module in model.named_modules():
        if native_for_torch() is not None and _is_rms_norm(module):
            specialise(module, RowsNorm)
            served.append(name)
    return tuple(served)


def _is_rms_norm(module: Any) -> bool:
    parameters = list(module.named_parameters(recurse=False))
    if [name for name, _ in parameters] != ["weight"] or not isinstance(
        getattr(module, "variance_epsilon", None), float
    ):
        return False
    (_, weight) = parameters[0]
    if weight.dim() != 1 or weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return False
    x = random_rows(2, weight.shape[0])
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * weight
    return agree(module.forward(x), expected)
