"""Every op that the runtime serves, by name; its module is imported when it is first asked for."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.runtime.ops.base import ServedOp

SERVED_OPS = {
    "moe_gemm": "tilewright.runtime.ops.moe_gemm:ServedMoeGemm",
    "gating": "tilewright.runtime.ops.gating:ServedGating",
    "attention": "tilewright.runtime.ops.attention:ServedAttention",
}
"""Module and class of each; an op of ``codegen`` that is not among them can be tuned, but not prepared."""


@cache
def served_op(name: str) -> ServedOp[Any]:
    """Op by name.

    Raises:
        TilewrightError: for an op that the runtime does not serve.

    """
    if name not in SERVED_OPS:
        raise TilewrightError(f"the runtime does not serve the op {name!r}; it serves {', '.join(SERVED_OPS)}")
    module, _, served = SERVED_OPS[name].partition(":")
    op: ServedOp[Any] = getattr(importlib.import_module(module), served)()
    return op
