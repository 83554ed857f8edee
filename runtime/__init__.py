"""Serve tuned kernels inside an inference engine.

::

    from tilewright.runtime import Experts

    experts = Experts(w_up, w_down, top_k=2)        # finds this machine's plan, packs the weights once
    y = experts(x, router_logits)                   # route, sort, up, down; correct torch where there is no plan
    print(experts.explain()[0])                     # which kernel serves which sizes, on what evidence
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tilewright.runtime.calls.bind import softmax_topk, sort_tokens
    from tilewright.runtime.notices import TilewrightWarning
    from tilewright.runtime.serve.attention import PagedDecode, VarlenPrefill
    from tilewright.runtime.serve.experts import Experts
    from tilewright.runtime.serve.explanation import Explanation, MemoryReport, MemoryUse
    from tilewright.runtime.serve.functional import grouped_gemm, moe_down, moe_up
    from tilewright.runtime.serve.gate import Gate, Gated
    from tilewright.runtime.serve.gemm import PreparedGemm, prepare
    from tilewright.runtime.serve.options import ServeOptions
    from tilewright.runtime.serve.prepared import PreparedCall, explain, memory_report

__all__ = [
    "Experts",
    "Explanation",
    "Gate",
    "Gated",
    "MemoryReport",
    "MemoryUse",
    "PagedDecode",
    "PreparedCall",
    "PreparedGemm",
    "ServeOptions",
    "TilewrightWarning",
    "VarlenPrefill",
    "explain",
    "grouped_gemm",
    "memory_report",
    "moe_down",
    "moe_up",
    "prepare",
    "softmax_topk",
    "sort_tokens",
]

_PLACES: Final = {
    "Experts": "serve.experts",
    "Explanation": "serve.explanation",
    "Gate": "serve.gate",
    "Gated": "serve.gate",
    "MemoryReport": "serve.explanation",
    "MemoryUse": "serve.explanation",
    "PagedDecode": "serve.attention",
    "PreparedCall": "serve.prepared",
    "PreparedGemm": "serve.gemm",
    "ServeOptions": "serve.options",
    "TilewrightWarning": "notices",
    "VarlenPrefill": "serve.attention",
    "explain": "serve.prepared",
    "grouped_gemm": "serve.functional",
    "memory_report": "serve.prepared",
    "moe_down": "serve.functional",
    "moe_up": "serve.functional",
    "prepare": "serve.gemm",
    "softmax_topk": "calls.bind",
    "sort_tokens": "calls.bind",
}
"""Where each name is: what needs no torch, such as the packing of weights, is imported without it."""


def __getattr__(name: str) -> Any:
    """What ``name`` stands for, imported when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value
