"""Signatures and problems that templates tend to get wrong; a new op adds to ``SIGNATURES`` and ``MORE_PROBLEMS``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from covering import covering_rows
from hypothesis import strategies as st
from numpy.typing import NDArray

from tilewright.codegen.hardware.archs import CPU_ARCHS, Arch, CpuArch
from tilewright.codegen.numbers.precisions import LOSSLESS, Precision, find_precision
from tilewright.codegen.ops.attention.problem import AttentionProblem
from tilewright.codegen.ops.attention.signature import AttentionSignature as Attention
from tilewright.codegen.ops.base import Arrays, Problem, Template
from tilewright.codegen.ops.gating.problem import GatingProblem
from tilewright.codegen.ops.gating.signature import GatingSignature as Gating
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature as MoeGemm
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config, Space
from tilewright.runtime.weights.dequantising import dequantise
from tilewright.runtime.weights.quantising import quantise

SIGNATURES: Mapping[str, Sequence[Signature]] = {
    "moe_gemm": (
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
    ),
    "gating": (
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
    ),
    "attention": (
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
    ),
}
"""For moe_gemm: sizes that no tile divides and sizes that all divide, n below one panel, k of one step and one step
into a block of k, k that scales can share, enough panels for the widest task, one expert, many, and more choices than
experts on this rank. For gating: every way to score, to choose and to order; experts that fill vectors and that do not,
one of them, all of them chosen. For attention, both stages: heads in groups of any size and alone, dims of vectors
and not, values of their own length, windows within a block and beyond, sinks, and pages of every kind."""


@st.composite
def gating_signatures(draw: st.DrawFn) -> Gating:
    """Any signature of a few experts."""
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    top_groups = draw(st.integers(1, groups))
    order = draw(st.sampled_from(["none", "rows", "blocks"]))
    return Gating(
        experts=groups * size,
        top_k=draw(st.integers(1, top_groups * size)),
        score=score,
        renormalize=draw(st.booleans()),
        bias=score == "sigmoid" and draw(st.booleans()),
        groups=groups,
        top_groups=top_groups,
        scale=draw(st.sampled_from([1.0, 2.5])),
        order=order,
        block_size=draw(st.integers(1, 20)) if order == "blocks" else 0,
    )


@st.composite
def attention_signatures(draw: st.DrawFn) -> Attention:
    """Any signature of a few heads."""
    stage = draw(st.sampled_from(["decode", "prefill"]))
    kv_heads = draw(st.integers(1, 5))
    return Attention(
        stage=stage,
        heads=kv_heads * draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(2, 33)),
        value_dim=8 * draw(st.integers(2, 33)),
        window=draw(st.sampled_from([0, 1, 100])),
        sinks=draw(st.booleans()),
        page_size=draw(st.integers(1, 70)) if stage == "decode" else 0,
        kv_layout=draw(st.sampled_from(["hnd", "nhd"])) if stage == "decode" else "",
    )


@dataclass(frozen=True)
class Case:
    """A variant to build and run."""

    op: str
    signature: Signature
    config: Config
    arch: Arch

    @property
    def template(self) -> Template[Any]:
        return find_op(self.op).template(self.config)

    @property
    def precision(self) -> str:
        return self.config.get("precision") or LOSSLESS

    def __str__(self) -> str:
        fields = [
            f"{name}={value}"
            for name, value in {**self.signature.to_dict(), **self.config}.items()
            if value is not None and name not in ("op", "template") and not name.endswith("_dtype")
        ]
        return f"{self.config['template']} {self.arch.name} {' '.join(fields)}"


def only_adds_products(arch: Arch) -> bool:
    """Whether ``arch`` is another one with instructions for products of integers, which only some templates use."""
    twins = (
        each for each in CPU_ARCHS.values() if isinstance(arch, CpuArch) and each.vector_bytes == arch.vector_bytes
    )
    return any(each.machine == arch.machine and set(each.features) < set(arch.features) for each in twins)


def templates_of(op_name: str, arch: Arch) -> list[Template[Any]]:
    """Templates that ``arch`` can run in some precision."""
    return [
        template
        for template in find_op(op_name).templates
        if arch.family in template.families
        and (not template.precisions or any(template.exclusion(name, arch) is None for name in template.precisions))
    ]


def space_of(op_name: str, template: Template[Any], signature: Signature, arch: Arch) -> Space:
    """Configs of one template, in every precision that these weights can be stored in."""
    if not template.precisions:
        return template.space(signature, arch)
    refusals = find_op(op_name).precisions(signature, arch)
    return template.space(signature, arch, tuple(name for name in template.precisions if refusals[name] is None))


def cases(arch: Arch) -> list[Case]:
    """For every template of ``arch``: every pair of two knobs' values, and of a knob's value and a signature."""
    return [
        case
        for op in OPS.values()
        for template in templates_of(op.name, arch)
        for case in _covering_cases(op.name, template, arch)
    ]


def few_cases(arch: Arch, count: int) -> list[Case]:
    """``count`` cases of every template, drawn at random, of signatures as different as there are."""
    random = np.random.default_rng(0)
    chosen = []
    for op in OPS.values():
        for template in templates_of(op.name, arch):
            signatures = [each for each in SIGNATURES[op.name] if template.applies(each, arch)]
            for number in range(count):
                signature = signatures[(2 * number + 1) * len(signatures) // (2 * count)]
                own = space_of(op.name, template, signature, arch)
                config = op.space(signature, arch).lift(template.name, own[int(random.integers(len(own)))])
                chosen.append(Case(op.name, signature, config, arch))
    return chosen


def precision_cases(arch: Arch) -> list[Case]:
    """One case of every template and kind of quantised element, of a signature that all of them suit."""
    random = np.random.default_rng(0)
    chosen = []
    for op in OPS.values():
        for template in templates_of(op.name, arch):
            kinds = {find_precision(name).dtype: name for name in template.precisions if name != LOSSLESS}
            for name in kinds.values():
                signature = next(s for s in reversed(SIGNATURES[op.name]) if op.precisions(s)[name] is None)
                own = template.space(signature, arch, (name,))
                config = op.space(signature, arch).lift(template.name, own[int(random.integers(len(own)))])
                chosen.append(Case(op.name, signature, config, arch))
    return chosen


def _covering_cases(op_name: str, template: Template[Any], arch: Arch) -> list[Case]:
    op = find_op(op_name)
    blocks = []
    values: dict[str, dict[Any, int]] = {}
    for number, signature in enumerate(SIGNATURES[op_name]):
        if not template.applies(signature, arch):
            continue
        space = space_of(op_name, template, signature, arch)
        columns = [np.full(len(space), number)]
        for index, parameter in enumerate(space.parameters):
            seen = values.setdefault(parameter.name, {})
            codes = np.array([seen.setdefault(value, len(seen)) for value in parameter.values])
            columns.append(codes[space.indices[:, index]])
        blocks.append(np.column_stack([*columns, np.arange(len(space))]))
    table = np.concatenate(blocks)
    made = []
    for row in covering_rows(table[:, :-1], seed=0):
        signature = SIGNATURES[op_name][table[row, 0]]
        config = space_of(op_name, template, signature, arch)[int(table[row, -1])]
        made.append(Case(op_name, signature, op.space(signature, arch).lift(template.name, config), arch))
    return made


def problems(op_name: str, signature: Signature) -> tuple[Problem, ...]:
    """The op's own awkward problems, and what more is worth a test but not a check of every kernel."""
    own = find_op(op_name).awkward_problems(signature)
    return (*own, *MORE_PROBLEMS[op_name](own[0]))


def _more_moe_gemm(problem: MoeGemmProblem) -> tuple[Problem, ...]:
    """One whose rows fill several tasks, and one of which this rank computes little."""
    hot = replace(problem, tokens=211, routing=RoutingSpec.parse("power-law:8"))
    return hot, replace(problem, tokens=2, all_experts=8 * problem.all_experts)


def _more_gating(problem: GatingProblem) -> tuple[Problem, ...]:
    """Enough tokens for several threads, skewed beyond what fp32 tells apart in a softmax, and equal logits."""
    skewed = replace(problem, tokens=1101, routing=RoutingSpec.parse("power-law:8"))
    return skewed, replace(problem, tokens=130, tied=True)


def _more_attention(problem: AttentionProblem) -> tuple[Problem, ...]:
    """Very uneven sequences, and one of several blocks of tokens with scores far apart."""
    uneven = RoutingSpec.parse("power-law:2")
    if problem.signature.stage == "decode":
        return replace(problem, tokens=7, context=130, routing=uneven), replace(problem, context=700, steep=True)
    return replace(problem, tokens=90, context=15, routing=uneven), replace(
        problem, tokens=600, context=600, steep=True
    )


MORE_PROBLEMS: Mapping[str, Callable[[Any], tuple[Problem, ...]]] = {
    "moe_gemm": _more_moe_gemm,
    "gating": _more_gating,
    "attention": _more_attention,
}


@dataclass(frozen=True, eq=False)
class Example:
    """A problem with its data and what must come out."""

    problem: Problem
    inputs: Arrays
    expected: Arrays


@lru_cache
def weights(op_name: str, signature: Signature) -> Arrays:
    return find_op(op_name).weights(signature, seed=0)


def rounded(weight: NDArray[np.float32], precision: Precision) -> NDArray[np.float32]:
    """``weight`` [experts, n, k] with the values that it has once it is stored in ``precision``."""
    words = (torch.from_numpy(quantise(each, precision).view(np.int32)) for each in weight)
    return np.stack([dequantise(each, precision, weight.shape[2]).numpy() for each in words])


@lru_cache
def examples(op_name: str, signature: Signature, precision: str = LOSSLESS) -> tuple[Example, ...]:
    """Data of all problems of a signature, and of one with values far beyond what activations flatten.

    What must come out is computed with the weights and activations as they are in ``precision``.
    """
    op = find_op(op_name)
    stored = weights(op_name, signature)
    if precision != LOSSLESS:
        stored = {**stored, "weight": rounded(stored["weight"], find_precision(precision))}
    drawn = [(problem, op.inputs(problem, seed)) for seed, problem in enumerate(problems(op_name, signature))]
    problem, inputs = drawn[1]
    if "x" in inputs:
        # A sum is off by parts of itself; where an output is clamped, that must stay little beside the limit.
        beyond = 8 if getattr(signature, "activation", "") == "swiglu_clamped" else 200
        drawn.append((problem, {**inputs, "x": inputs["x"] * np.float32(beyond)}))
    return tuple(
        Example(problem, inputs, op.reference(signature, stored, op.rounded_inputs(signature, inputs, precision)))
        for problem, inputs in drawn
    )
