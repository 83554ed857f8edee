"""Constants of the model, and where they are from.

Fitted by ``benchmarks/fit_prediction.py`` on Triton GEMM candidates of the PyTorch AutoHeuristic data (A100, and H100
where said). They are of the model, not of a device: predicting for another device exchanges its ceilings alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """What data sheets do not tell."""

    launch_us: float
    """From one launch of a stream to the next."""
    matrix_share: float
    """Of the matrix units' peak that a large, well-fed tile reaches."""
    feed: float
    """Elements of a tile's side at which its operands take as long as its multiply-adds: small tiles reach less."""
    dram_share: float
    """Of the memory's peak."""
    l2_ratio: float
    """Rate at which all multiprocessors together load from L2, over the peak of the memory behind it."""
    step_us: float
    """Latency of one iteration that nothing hides; further stages hide it in equal parts."""
    first_stage: float
    """Of a stage's worth: what a loop without pipelining has of other warps' help."""
    overlap: float
    """Exponent of the norm that joins terms: 1 adds them up, infinity hides all but the longest."""
    wave_us: float
    """Start and end of a block: indices, pipeline fill, epilogue."""
    register_pressure: float
    """Loss of matrix rate where accumulators leave few registers for operands."""
    narrow_share: float
    """Of the matrix rate without the arch's warp-group instructions (few rows or warps)."""
    scalar_share: float
    """Of the fp32 peak that work outside the matrix units reaches. Not fitted: half of it, as it is mostly additions
    and conversions, of which each counts once where a fused multiply-add would count twice."""
