"""Attention for tests: what templates tend to get wrong, and how a batch is taken apart."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.attention.problem import AttentionProblem
from tilewright.codegen.ops.attention.signature import AttentionSignature as Attention
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.examples import OpExamples, Part
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.routing.spec import RoutingSpec

_SIGNATURES = (
    Attention(stage="decode", heads=8, kv_heads=2, head_dim=64, kv_layout="nhd"),
    Attention(stage="decode", heads=5, kv_heads=1, head_dim=128, window=37, sinks=True, page_size=1),
    Attention(stage="decode", heads=3, kv_heads=3, head_dim=80, page_size=7),
    Attention(stage="decode", heads=6, kv_heads=2, head_dim=72, value_dim=40, scale=0.3, window=900, page_size=64),
    Attention(stage="decode", heads=16, kv_heads=1, head_dim=256, sinks=True, kv_layout="nhd", page_size=24),
    Attention(stage="prefill", heads=8, kv_heads=2, head_dim=64),
    Attention(stage="prefill", heads=5, kv_heads=1, head_dim=128, window=37, sinks=True),
    Attention(stage="prefill", heads=3, kv_heads=3, head_dim=80),
    Attention(stage="prefill", heads=6, kv_heads=2, head_dim=72, value_dim=40, scale=0.3, window=200),
    Attention(stage="prefill", heads=16, kv_heads=1, head_dim=256, sinks=True),
)
"""Both stages: heads in groups of any size and alone, dims of vectors and not, values of their own length, windows
within a block and beyond, sinks, and pages of every kind."""

_GPU_SIGNATURES = (
    Attention(stage="decode", heads=32, kv_heads=8, head_dim=128, q_dtype="bf16"),
    Attention(stage="decode", heads=64, kv_heads=8, head_dim=64, window=128, sinks=True, q_dtype="bf16"),
    Attention(stage="decode", heads=40, kv_heads=1, head_dim=80, value_dim=72, page_size=256, q_dtype="fp16"),
    Attention(
        stage="decode", heads=5, kv_heads=5, head_dim=96, kv_layout="nhd", page_size=7, q_dtype="fp16", sinks=True
    ),
    Attention(
        stage="decode",
        heads=24,
        kv_heads=8,
        head_dim=128,
        window=70,
        kv_layout="nhd",
        page_size=64,
        q_dtype="bf16",
        kv_dtype="fp8_e4m3",
        out_dtype="fp32",
    ),
    Attention(
        stage="decode",
        heads=48,
        kv_heads=1,
        head_dim=144,
        value_dim=128,
        latent=True,
        scale=48**-0.5,
        q_dtype="bf16",
    ),
    Attention(
        stage="decode",
        heads=20,
        kv_heads=1,
        head_dim=104,
        value_dim=80,
        latent=True,
        scale=0.2,
        window=70,
        sinks=True,
        page_size=64,
        q_dtype="fp16",
        kv_dtype="fp8_e4m3",
        out_dtype="fp32",
    ),
    Attention(stage="prefill", heads=32, kv_heads=8, head_dim=128, q_dtype="bf16"),
    Attention(stage="prefill", heads=64, kv_heads=8, head_dim=64, window=128, sinks=True, q_dtype="bf16"),
    Attention(stage="prefill", heads=10, kv_heads=2, head_dim=80, value_dim=72, window=33, q_dtype="fp16"),
    Attention(stage="prefill", heads=3, kv_heads=3, head_dim=96, sinks=True, q_dtype="fp16", out_dtype="fp32"),
)
"""Groups that fill a tile, that do not, and that need several; head dims that are one power of two or need several
products; pages larger than tiles, smaller, and odd; windows, sinks, and keys in 8 bits; latent rows of two parts (a
quarter of DeepSeek's, for the interpreter's sake), and of parts that are no powers of two."""


def _random_signature(draw: random.Random) -> Attention:
    """Any signature of a few heads."""
    decode = draw.random() < 0.5
    kv_heads = draw.randint(1, 5)
    return Attention(
        stage="decode" if decode else "prefill",
        heads=kv_heads * draw.randint(1, 9),
        kv_heads=kv_heads,
        head_dim=8 * draw.randint(2, 33),
        value_dim=8 * draw.randint(2, 33),
        window=draw.choice((0, 1, 100)),
        sinks=draw.random() < 0.5,
        page_size=draw.randint(1, 70) if decode else 0,
        kv_layout=draw.choice(("hnd", "nhd")) if decode else "",
    )


def _more_problems(problem: AttentionProblem) -> tuple[Problem, ...]:
    """Very uneven sequences, and one of several blocks of tokens with scores far apart."""
    uneven = RoutingSpec.parse("power-law:2")
    if problem.signature.stage == "decode":
        return replace(problem, tokens=7, context=130, routing=uneven), replace(problem, context=700, steep=True)
    return replace(problem, tokens=90, context=15, routing=uneven), replace(
        problem, tokens=600, context=600, steep=True
    )


def _tokens_of(signature: Attention, inputs: Arrays) -> int:
    """Sequences of a batch."""
    return len(inputs["cu_seqlens"]) - 1 if signature.stage == "prefill" else len(inputs["lengths"])


def _part_of(signature: Attention, inputs: Arrays, sequences: NDArray[np.int64]) -> Part:
    """Sequences by themselves; decoding ones stay where they lie in the cache."""
    if signature.stage == "decode":
        own = {name: inputs[name][sequences] for name in ("q", "block_table", "lengths")}
        return Part({**inputs, **own}, {"out": sequences})
    boundaries = inputs["cu_seqlens"].astype(np.int64)
    tokens = np.concatenate([np.arange(boundaries[each], boundaries[each + 1]) for each in sequences])
    lengths = np.diff(boundaries)[sequences]
    own = {name: inputs[name][tokens] for name in ("q", "k", "v")}
    own["cu_seqlens"] = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return Part(own, {"out": tokens})


EXAMPLES = OpExamples(
    signatures=_SIGNATURES,
    gpu_signatures=_GPU_SIGNATURES,
    random_signature=_random_signature,
    more_problems=_more_problems,
    tokens_of=_tokens_of,
    part_of=_part_of,
)
