"""How gate and up halves of an expert are joined, in plain torch: what kernels and modules are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.codegen.numbers.activations import CLAMPED_ALPHA, CLAMPED_LIMIT
from tilewright.errors import TilewrightError

if TYPE_CHECKING:
    import torch


def join_halves(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activation's definition, on tensors of any one shape.

    Raises:
        TilewrightError: for an activation without a gate.

    """
    import torch

    match activation:
        case "swiglu":
            return gate * torch.sigmoid(gate) * up
        case "geglu":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        case "swiglu_clamped":
            gate, up = gate.clamp(max=CLAMPED_LIMIT), up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)
            return gate * torch.sigmoid(CLAMPED_ALPHA * gate) * (up + 1)
        case _:
            raise TilewrightError(f"the activation {activation!r} has no gate")
