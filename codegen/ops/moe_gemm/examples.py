"""Grouped GEMMs for tests: what templates tend to get wrong, and how a batch is taken apart."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.examples import OpExamples, Part
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import Activation, Stage
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature as MoeGemm
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.routing.spec import RoutingSpec

_SIGNATURES = (
    MoeGemm(stage="up", experts=4, n=53, k=77, top_k=2),
    MoeGemm(stage="up", experts=3, n=5, k=300, top_k=2, activation="swiglu", bias=True),
    MoeGemm(stage="up", experts=5, n=64, k=64, top_k=1, activation="geglu"),
    MoeGemm(stage="up", experts=2, n=401, k=33, top_k=2, activation="geglu", bias=True),
    MoeGemm(stage="down", experts=5, n=50, k=600, top_k=3, bias=True),
    MoeGemm(stage="down", experts=1, n=33, k=1),
    MoeGemm(stage="down", experts=40, n=401, k=24, top_k=6),
    MoeGemm(stage="down", experts=2, n=16, k=257, top_k=4),
    MoeGemm(stage="plain", experts=6, n=401, k=129),
    MoeGemm(stage="plain", experts=2, n=1, k=1030, bias=True),
    MoeGemm(stage="up", experts=3, n=41, k=384, top_k=2, activation="swiglu", bias=True),
    MoeGemm(stage="down", experts=2, n=37, k=640, top_k=2),
    MoeGemm(stage="up", experts=3, n=45, k=128, top_k=2, activation="swiglu_clamped", bias=True),
)
"""Sizes that no tile divides and sizes that all divide, n below one panel, k of one step and one step into a block of
k, k that scales can share, enough panels for the widest task, one expert, many, and more choices than experts on this
rank."""

_GPU_SIGNATURES = (
    MoeGemm(stage="up", experts=8, n=768, k=2048, top_k=2, activation="swiglu", x_dtype="bf16"),
    MoeGemm(stage="up", experts=5, n=360, k=1184, top_k=2, activation="swiglu_clamped", bias=True, x_dtype="bf16"),
    MoeGemm(stage="up", experts=4, n=200, k=520, top_k=1, activation="geglu", x_dtype="fp16", out_dtype="fp32"),
    MoeGemm(stage="down", experts=8, n=1024, k=768, top_k=2, x_dtype="fp16"),
    MoeGemm(stage="down", experts=3, n=600, k=1440, top_k=3, bias=True, x_dtype="bf16"),
    MoeGemm(stage="plain", experts=4, n=512, k=1024, x_dtype="bf16"),
    MoeGemm(stage="plain", experts=2, n=72, k=1096, bias=True, x_dtype="bf16"),
)
"""Sizes that every tile divides, and sizes that none does; k that all groups of scales divide, and k that few do."""


def _random_signature(draw: random.Random) -> MoeGemm:
    """Any signature, sizes small and large alike often."""
    stage = draw.choice(get_args(Stage))
    n, k = (draw.randint(1, draw.choice((40, 1 << 14))) for _ in range(2))
    return MoeGemm(
        stage=stage,
        experts=draw.randint(1, 512),
        n=n,
        k=k,
        top_k=1 if stage == "plain" else draw.randint(1, 16),
        activation=draw.choice(get_args(Activation)) if stage == "up" else "none",
        bias=draw.random() < 0.5,
    )


def _more_problems(problem: MoeGemmProblem) -> tuple[Problem, ...]:
    """One whose rows fill several tasks, and one of which this rank computes little."""
    hot = replace(problem, tokens=211, routing=RoutingSpec.parse("power-law:8"))
    return hot, replace(problem, tokens=2, all_experts=8 * problem.all_experts)


def _tokens_of(signature: MoeGemm, inputs: Arrays) -> int:
    """Tokens of a batch; of stage ``plain``, rows."""
    return len(inputs["slot_row" if signature.stage == "down" else "x"])


def _part_of(signature: MoeGemm, inputs: Arrays, tokens: NDArray[np.int64]) -> Part:
    """``tokens`` of a batch by themselves, with their rows and no others."""
    offsets = inputs["expert_offsets"].astype(np.int64)
    row_expert = np.repeat(np.arange(signature.experts), np.diff(offsets))
    results: Mapping[str, NDArray[np.int64]]
    match signature.stage:
        case "up":
            rows = np.flatnonzero(np.isin(inputs["row_token"][: len(row_expert)], tokens))
            own = {
                "x": inputs["x"][tokens],
                "row_token": np.searchsorted(tokens, inputs["row_token"][rows]).astype(np.int32),
            }
            results = {"out": rows}
        case "down":
            slots = inputs["slot_row"][tokens]
            rows = np.unique(slots[slots >= 0]).astype(np.int64)
            own = {
                "x": inputs["x"][rows],
                "slot_row": np.where(slots >= 0, np.searchsorted(rows, slots), -1).astype(np.int32),
                "topk_weights": inputs["topk_weights"][tokens],
            }
            results = {"out": tokens}
        case _:
            rows = tokens
            own = {"x": inputs["x"][rows]}
            results = {"out": rows}
    counts = np.bincount(row_expert[rows], minlength=signature.experts)
    own["expert_offsets"] = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return Part(own, results)


EXAMPLES = OpExamples(
    signatures=_SIGNATURES,
    gpu_signatures=_GPU_SIGNATURES,
    random_signature=_random_signature,
    more_problems=_more_problems,
    tokens_of=_tokens_of,
    part_of=_part_of,
)
