"""Activations of expert layers in plain torch."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.numbers.activations import CLAMPED_ALPHA, CLAMPED_LIMIT
from tilewright.codegen.ops.moe_gemm.signature import Activation
from tilewright.errors import TilewrightError


def activate(y: Tensor, activation: str) -> Tensor:
    """``y`` [rows, n], or the gated half of it when ``activation`` takes a gate and an up half."""
    match activation:
        case "none":
            return y
        case "swiglu":
            gate, up = y.chunk(2, dim=-1)
            return functional.silu(gate) * up
        case "geglu":
            gate, up = y.chunk(2, dim=-1)
            return functional.gelu(gate, approximate="tanh") * up
        case "swiglu_clamped":
            gate, up = y.chunk(2, dim=-1)
            gate, up = gate.clamp(max=CLAMPED_LIMIT), up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)
            return gate * torch.sigmoid(CLAMPED_ALPHA * gate) * (up + 1)
        case _:
            raise TilewrightError(f"unknown activation {activation!r}; known: {', '.join(get_args(Activation))}")
