"""Serve tuned kernels inside an inference engine.

::

    from tilewright.runtime import Experts

    experts = Experts(w_up, w_down, top_k=2)        # finds this machine's plan, packs the weights once
    y = experts(x, router_logits)                   # route, sort, up, down; correct torch where there is no plan
    print(experts.explain()[0])                     # which kernel serves which sizes, on what evidence
"""

from __future__ import annotations

from tilewright.runtime.calls.bind import softmax_topk, sort_tokens
from tilewright.runtime.notices import TilewrightWarning
from tilewright.runtime.serve.attention import PagedDecode, VarlenPrefill
from tilewright.runtime.serve.experts import Experts
from tilewright.runtime.serve.explanation import Explanation, MemoryReport, MemoryUse
from tilewright.runtime.serve.functional import grouped_gemm, moe_down, moe_up
from tilewright.runtime.serve.gate import Gate, Gated
from tilewright.runtime.serve.gemm import PreparedGemm, prepare
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.prepared import PreparedCall, live_prepared

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


def explain() -> tuple[Explanation, ...]:
    """What serves each weight that is prepared in this process, sorted by signature."""
    explanations = [prepared.explain() for prepared in live_prepared()]
    return tuple(sorted(explanations, key=lambda explanation: explanation.memory.label))


def memory_report() -> MemoryReport:
    """What every weight that is prepared in this process costs in memory, largest first."""
    uses = [prepared.memory for prepared in live_prepared()]
    return MemoryReport(tuple(sorted(uses, key=lambda use: (-use.bytes, use.label))))
