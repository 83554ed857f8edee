"""Gating for tests: what templates tend to get wrong, and how a batch is taken apart."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.examples import OpExamples, Part
from tilewright.codegen.ops.gating.problem import GatingProblem
from tilewright.codegen.ops.gating.signature import GatingSignature as Gating
from tilewright.codegen.ops.gating.signature import Order
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.routing.spec import RoutingSpec

_SIGNATURES = (
    Gating(experts=8, top_k=2, order="rows"),
    Gating(experts=64, top_k=6, renormalize=False, scale=1.5),
    Gating(experts=128, top_k=8, order="blocks", block_size=16),
    Gating(experts=53, top_k=5, renormalize=False, order="rows"),
    Gating(experts=16, top_k=1, score="sigmoid", renormalize=False),
    Gating(experts=7, top_k=7, score="sigmoid", order="blocks", block_size=1),
    Gating(experts=64, top_k=4, score="sigmoid", bias=True, scale=2.5),
    Gating(experts=256, top_k=8, score="sigmoid", bias=True, groups=8, top_groups=4, scale=2.5, order="rows"),
    Gating(experts=60, top_k=4, groups=5, top_groups=2, renormalize=False),
    Gating(experts=36, top_k=6, score="sigmoid", groups=6, top_groups=1, order="blocks", block_size=7),
    Gating(experts=1, top_k=1, order="rows"),
    Gating(experts=391, top_k=10),
)
"""Every way to score, to choose and to order; experts that fill vectors and that do not, one of them, all of them
chosen."""

_GPU_SIGNATURES = (
    Gating(experts=8, top_k=2, order="rows"),
    Gating(experts=128, top_k=8, order="blocks", block_size=16),
    Gating(experts=256, top_k=8, score="sigmoid", bias=True, groups=8, top_groups=4, scale=2.5, order="rows"),
    Gating(experts=60, top_k=4, groups=5, top_groups=2, renormalize=False),
    Gating(experts=36, top_k=6, score="sigmoid", groups=6, top_groups=3, order="blocks", block_size=7),
    Gating(experts=53, top_k=5, renormalize=False, order="rows"),
    Gating(experts=7, top_k=7, score="sigmoid", renormalize=False, order="blocks", block_size=1),
    Gating(experts=64, top_k=4, score="sigmoid", bias=True, scale=2.5),
    Gating(experts=1, top_k=1, order="rows"),
)
"""Every way to score, to choose and to order; experts and groups that are powers of two and not."""


def _random_signature(draw: random.Random) -> Gating:
    """Any signature of a few experts."""
    sigmoid = draw.random() < 0.5
    groups, size = draw.randint(1, 4), draw.randint(2, 9)
    top_groups = draw.randint(1, groups)
    order = draw.choice(get_args(Order))
    return Gating(
        experts=groups * size,
        top_k=draw.randint(1, top_groups * size),
        score="sigmoid" if sigmoid else "softmax",
        renormalize=draw.random() < 0.5,
        bias=sigmoid and draw.random() < 0.5,
        groups=groups,
        top_groups=top_groups,
        scale=draw.choice((1.0, 2.5)),
        order=order,
        block_size=draw.randint(1, 20) if order == "blocks" else 0,
    )


def _more_problems(problem: GatingProblem) -> tuple[Problem, ...]:
    """Enough tokens for several threads, skewed beyond what fp32 tells apart in a softmax, and equal logits."""
    skewed = replace(problem, tokens=1101, routing=RoutingSpec.parse("power-law:8"))
    return skewed, replace(problem, tokens=130, tied=True)


def _tokens_of(_signature: Gating, inputs: Arrays) -> int:
    return len(inputs["logits"])


def _part_of(_signature: Gating, inputs: Arrays, tokens: NDArray[np.int64]) -> Part:
    """What comes out beside choices and weights is the order of rows, which is about the batch."""
    return Part({"logits": inputs["logits"][tokens]}, {"topk_ids": tokens, "topk_weights": tokens})


EXAMPLES = OpExamples(
    signatures=_SIGNATURES,
    gpu_signatures=_GPU_SIGNATURES,
    random_signature=_random_signature,
    more_problems=_more_problems,
    tokens_of=_tokens_of,
    part_of=_part_of,
)
