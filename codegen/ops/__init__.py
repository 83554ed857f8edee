"""One module per op; each declares everything that the rest of tilewright derives from it."""

from __future__ import annotations

from typing import Any

from tilewright.codegen.ops.attention import Attention
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.gating import Gating
from tilewright.codegen.ops.moe_gemm import MoeGemm
from tilewright.errors import TilewrightError

OPS: dict[str, OpDeclaration[Any, Any]] = {op.name: op for op in (MoeGemm(), Gating(), Attention())}


def find_op(name: str) -> OpDeclaration[Any, Any]:
    """Op by name.

    Raises:
        TilewrightError: for an unknown name.

    """
    if name not in OPS:
        raise TilewrightError(f"unknown op {name!r}; known ops: {', '.join(OPS)}")
    return OPS[name]
