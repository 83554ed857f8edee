"""attention: softmax(scale * q . k) . v of query heads that share key/value heads, over sequences of various lengths.

For query head h of the token at position i of a sequence, with g = h // (heads / kv_heads) and j running over the
positions that it sees, ``max(0, i - window + 1)`` to i (without a window: 0 to i)::

    p[j] = exp(scale * q[h] . k[j, g]) / (sum_j exp(scale * q[h] . k[j, g]) + exp(sinks[h]))
    out[h] = sum_j p[j] * v[j, g]

without the last term of the denominator where there are no sinks. Stage ``decode`` computes the last position of every
sequence from a paged cache, ``prefill`` all positions of sequences that are packed one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import AttentionLayers
from tilewright.codegen.numbers.dtypes import ITEMSIZE, ROUNDING, round_to
from tilewright.codegen.ops.attention.cpu.templates import CPU
from tilewright.codegen.ops.attention.inputs import draw, draw_cache, draw_queries, gather_sequence, split_tokens
from tilewright.codegen.ops.attention.problem import DEFAULT_CONTEXT, AttentionProblem
from tilewright.codegen.ops.attention.signature import AttentionSignature, Stage
from tilewright.codegen.ops.attention.triton.templates import TRITON
from tilewright.codegen.ops.base import Arrays, OpDeclaration, Phase, Workload
from tilewright.codegen.ops.implementation import Implementation
from tilewright.codegen.routing.spec import RoutingSpec

_REFERENCE_ROWS = 256
"""Queries that the reference computes at once, which bounds its memory."""
_EXPONENTIAL_FLOPS = 16
"""Of a score: its exponential, sum and maximum."""

_STAGES: tuple[Stage, ...] = ("decode", "prefill")
_LADDERS: Mapping[Stage, tuple[int, ...]] = {"decode": (1, 4, 16, 64), "prefill": (64, 256, 1024)}


class Attention(OpDeclaration[AttentionSignature, AttentionProblem]):
    """The declaration of attention."""

    name: ClassVar[str] = "attention"
    implementations: ClassVar[tuple[Implementation, ...]] = (CPU, TRITON)
    signature_type: ClassVar[type[AttentionSignature]] = AttentionSignature
    problem_type: ClassVar[type[AttentionProblem]] = AttentionProblem
    served_by: ClassVar[tuple[str, ...]] = ("PagedDecode", "VarlenPrefill")
    needed_for: ClassVar[str] = "attention over all tokens or a window"
    sizes_help: ClassVar[str] = "sequences that decode together (1,4,16,64), or tokens of prompts (64,256,1024)"

    def signatures(self, model: ModelShape) -> tuple[AttentionSignature, ...]:
        """Decode and prefill of every kind of layer of ``model``, with the heads of one tensor-parallel rank.

        Latent attention (DeepSeek) is as Transformers computes it, one key and one value per query head; see
        :meth:`signatures_on` for GPUs.
        """
        return tuple(dict.fromkeys(_expanded(each, model, stage) for stage in _STAGES for each in model.attention))

    def signatures_on(self, model: ModelShape, arch: Arch) -> tuple[AttentionSignature, ...]:
        """Latent attention decodes in its absorbed form where some template for ``arch`` computes that.

        The cache then holds one row per token for all heads.
        """
        found = []
        for stage in _STAGES:
            for each in model.attention:
                plain = self.on(_expanded(each, model, stage), arch)
                own = self.on(_absorbed(each, model), arch) if each.latent_dim and stage == "decode" else None
                found.append(own if own is not None and self.templates_for(own, arch) else plain)
        return tuple(dict.fromkeys(found))

    def ladder(self, signature: AttentionSignature, arch: Arch) -> tuple[int, ...]:
        """Sequences that decode together, and tokens of a prompt: what limits them is not the kernel."""
        del arch
        return _LADDERS[signature.stage]

    def calls_per_pass(self, signature: AttentionSignature, model: ModelShape, phase: Phase) -> float:
        """Once in every layer of its kind; see :class:`OpDeclaration`."""
        if signature.stage != phase:
            return 0.0
        asked, form = self.declared(signature), _absorbed if signature.latent else None
        alike = (
            each
            for each in model.attention
            if (form(each, model) if form else _expanded(each, model, signature.stage)) == asked
        )
        return float(sum(each.calls for each in alike))

    def problem(
        self, signature: AttentionSignature, tokens: int, routing: RoutingSpec, model: ModelShape | None = None
    ) -> AttentionProblem:
        """Problem of ``tokens`` tokens in sequences of the default length; ``model`` has no part in it."""
        del model
        return AttentionProblem(signature, tokens, DEFAULT_CONTEXT, routing)

    def weights(self, signature: AttentionSignature, seed: int) -> Arrays:
        """The sinks, where there are some: about as large as scores."""
        if not signature.sinks:
            return {}
        return {"sinks": np.random.default_rng((seed, 7)).normal(0, 1, signature.heads).astype(np.float32)}

    def inputs(self, problem: AttentionProblem, seed: int) -> Arrays:
        """Queries, keys, values (float32, of their dtypes' values), and where they lie."""
        signature = problem.signature
        random = np.random.default_rng((seed, 8))
        lengths = split_tokens(problem.routing, *problem.lengths_total, seed)
        q = draw_queries(signature, problem.tokens, random, steep=problem.steep)
        if signature.stage == "decode":
            arrays: Arrays = {"q": q, **draw_cache(signature, lengths, random)}
        else:
            arrays = {
                "q": q,
                "k": draw((problem.tokens, signature.kv_heads, signature.head_dim), random),
                "v": draw((problem.tokens, signature.kv_heads, signature.value_dim), random),
                "cu_seqlens": np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            }
        for spec in signature.tensors():
            if spec.name in arrays and spec.dtype != "int32":
                arrays[spec.name] = round_to(arrays[spec.name], spec.dtype)
        return arrays

    def input_bytes(self, problem: AttentionProblem) -> int:
        """Keys and values of all sequences."""
        signature = problem.signature
        return 4 * problem.lengths_total[0] * signature.kv_heads * signature.kv_elements

    def compute_dtype(self, signature: AttentionSignature) -> str:
        """That of the queries."""
        return signature.q_dtype

    def reference(self, signature: AttentionSignature, weights: Arrays, inputs: Arrays) -> Arrays:
        """Sequence by sequence in float64."""
        out = np.empty((len(inputs["q"]), signature.heads, signature.value_dim))
        sinks = weights.get("sinks")
        if signature.stage == "decode":
            for row, length in enumerate(inputs["lengths"].tolist()):
                k, v = gather_sequence(signature, inputs, row)
                out[row : row + 1] = _attend(signature, inputs["q"][row : row + 1], k, v, sinks, length - 1)
            return {"out": out}
        boundaries: list[int] = inputs["cu_seqlens"].tolist()
        for begin, end in itertools.pairwise(boundaries):
            for first in range(begin, end, _REFERENCE_ROWS):
                last = min(first + _REFERENCE_ROWS, end)
                k, v = inputs["k"][begin:last], inputs["v"][begin:last]
                out[first:last] = _attend(signature, inputs["q"][first:last], k, v, sinks, first - begin)
        return {"out": out}

    def tolerance(self, signature: AttentionSignature) -> float:
        """A score of 150 is known to 3e-5 in fp32, and its exponential no better; usual scores to a hundredth.

        Exponentials are rounded to the queries' dtype before the second product, and outputs to theirs.
        """
        return 5e-5 + ROUNDING[signature.q_dtype] + ROUNDING[signature.out_dtype]

    def workload(self, problem: AttentionProblem, inputs: Arrays) -> Workload:
        """Two products and an exponential for every pair of a query and a token that it sees; tensors move once."""
        signature = problem.signature
        if signature.stage == "decode":
            seen = inputs["lengths"].astype(np.int64)
            seen = np.minimum(seen, signature.window) if signature.window else seen
            pairs, kv_rows = int(seen.sum()), int(seen.sum())
        else:
            lengths = np.diff(inputs["cu_seqlens"]).astype(np.int64)
            # Queries that see fewer tokens than the window holds are like those of a shorter sequence.
            inside = np.minimum(lengths, signature.window) if signature.window else lengths
            pairs, kv_rows = int((inside * (inside + 1) // 2 + (lengths - inside) * inside).sum()), problem.tokens
        dims = signature.head_dim + signature.value_dim
        flops = pairs * signature.heads * (2 * dims + _EXPONENTIAL_FLOPS)
        kv_bytes = ITEMSIZE[signature.kv_dtype] * kv_rows * signature.kv_heads * signature.kv_elements
        row_bytes = (
            ITEMSIZE[signature.q_dtype] * signature.head_dim + ITEMSIZE[signature.out_dtype] * signature.value_dim
        )
        return Workload(flops=float(flops), min_bytes=float(kv_bytes + problem.tokens * signature.heads * row_bytes))

    def awkward_problems(self, signature: AttentionSignature) -> tuple[AttentionProblem, ...]:
        """One token; short sequences of uneven lengths with scores far apart; and sequences that are split."""
        one = AttentionProblem(signature, 1, 1, RoutingSpec.parse("balanced"))
        uneven = RoutingSpec.parse("power-law:1")
        if signature.stage == "decode":
            short, long = replace(one, tokens=3, context=29), replace(one, tokens=2, context=1700)
        else:
            short, long = replace(one, tokens=75, context=19), replace(one, tokens=301, context=280)
        return one, replace(short, routing=uneven, steep=True), replace(long, routing=uneven)

    def _no_template(self, signature: AttentionSignature, arch: Arch, precisions: Collection[str]) -> str:
        if signature.latent and not any(each.applies(signature, arch) for each in self.templates_on(arch)):
            return (
                "latent attention (MLA) has templates for GPUs alone; here, tune what it expands to: "
                f"kv_heads={signature.heads} with their head_dim and value_dim, without latent"
            )
        return super()._no_template(signature, arch, precisions)


def _expanded(attention: AttentionLayers, model: ModelShape, stage: Stage) -> AttentionSignature:
    heads, kv_heads = model.heads_per_rank(attention)
    return AttentionSignature(
        stage=stage,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        value_dim=attention.value_dim,
        scale=attention.scale,
        window=attention.window,
        sinks=attention.sinks,
    )


def _absorbed(attention: AttentionLayers, model: ModelShape) -> AttentionSignature:
    """Latent attention over rows of the cache that stand for all heads."""
    return replace(
        _expanded(attention, model, "decode"),
        latent=True,
        kv_heads=1,
        kv_layout="",
        head_dim=attention.latent_dim + attention.rope_dim,
        value_dim=attention.latent_dim,
    )


def _attend(
    signature: AttentionSignature,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    sinks: NDArray[np.float32] | None,
    position: int,
) -> NDArray[np.float64]:
    """[queries, heads, value_dim] of queries from ``position`` on, by keys and values [tokens, kv_heads, dim]."""
    out = np.empty((len(q), signature.heads, signature.value_dim))
    at = position + np.arange(len(q))[:, None]
    token = np.arange(len(k))[None, :]
    hidden = token > at
    if signature.window:
        hidden |= token <= at - signature.window
    for head in range(signature.heads):
        kv_head = head // signature.group
        scores = signature.scale * (q[:, head].astype(np.float64) @ k[:, kv_head].astype(np.float64).T)
        scores[hidden] = -np.inf
        largest = scores.max(axis=1, keepdims=True)
        if sinks is not None:
            largest = np.maximum(largest, float(sinks[head]))
        exponentials = np.exp(scores - largest)
        total = exponentials.sum(axis=1, keepdims=True)
        if sinks is not None:
            total += np.exp(float(sinks[head]) - largest)
        out[:, head] = (exponentials / total) @ v[:, kv_head].astype(np.float64)
    return out
