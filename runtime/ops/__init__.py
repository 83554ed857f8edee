"""One module per op that the runtime serves; an op of ``codegen`` without one cannot be prepared."""

from __future__ import annotations

from typing import Any

from tilewright.errors import TilewrightError
from tilewright.runtime.ops.attention import ServedAttention
from tilewright.runtime.ops.base import ServedOp
from tilewright.runtime.ops.gating import ServedGating
from tilewright.runtime.ops.moe_gemm import ServedMoeGemm

SERVED_OPS: dict[str, ServedOp[Any]] = {op.name: op for op in (ServedMoeGemm(), ServedGating(), ServedAttention())}


def served_op(name: str) -> ServedOp[Any]:
    """Op by name.

    Raises:
        TilewrightError: for an op that the runtime does not serve.

    """
    if name not in SERVED_OPS:
        raise TilewrightError(f"the runtime does not serve the op {name!r}; it serves {', '.join(SERVED_OPS)}")
    return SERVED_OPS[name]
