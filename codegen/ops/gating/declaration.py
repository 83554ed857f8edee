"""gating: which experts each token goes to, with which weights, and the order of rows that this makes.

With ``score`` = softmax(logits) over all experts or sigmoid(logits), and ids chosen as :class:`GatingSignature` says:

* ``topk_ids[t, j]``: the j-th best expert of token t
* ``topk_weights[t, j] = scale * score[t, topk_ids[t, j]]``, divided by the token's sum of them with ``renormalize``
* order ``rows``: ``sort_tokens(topk_ids)``; order ``blocks``: also every expert's choices padded to whole blocks

Routings of models are points of this: softmax then top-k (Mixtral, Qwen3), top-k then softmax (gpt-oss; the same as
renormalised weights), sigmoid with a selection bias and the best groups first (DeepSeek-V3, arXiv 2412.19437).
Experts of groups that were not chosen count as -inf; NaN and +inf among logits, and tokens with nothing but -inf, are
refused by the runtime with a sentence that names the logit.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import RouterLayers
from tilewright.codegen.ops.base import Arrays, OpDeclaration, Phase, Workload
from tilewright.codegen.ops.gating.cpu.templates import CPU
from tilewright.codegen.ops.gating.inputs import biased_scores, generate_bias, generate_logits, group_scores
from tilewright.codegen.ops.gating.problem import GatingProblem
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.gating.triton.templates import TRITON
from tilewright.codegen.ops.implementation import Implementation
from tilewright.codegen.routing.spec import RoutingSpec, pad_blocks, sort_tokens


class Gating(OpDeclaration[GatingSignature, GatingProblem]):
    """The declaration of gating."""

    name: ClassVar[str] = "gating"
    implementations: ClassVar[tuple[Implementation, ...]] = (CPU, TRITON)
    signature_type: ClassVar[type[GatingSignature]] = GatingSignature
    problem_type: ClassVar[type[GatingProblem]] = GatingProblem
    served_by: ClassVar[tuple[str, ...]] = ("Gate",)
    needed_for: ClassVar[str] = "routers"

    def signatures(self, model: ModelShape) -> tuple[GatingSignature, ...]:
        """Every kind of router of ``model``, with rows in order: every rank routes over all experts."""
        return tuple(dict.fromkeys(_signature(each) for each in model.routers))

    def calls_per_pass(self, signature: GatingSignature, model: ModelShape, phase: Phase) -> float:
        """Once in every layer with such a router."""
        del phase
        asked = self.declared(signature)
        return float(sum(each.calls for each in model.routers if _signature(each) == asked))

    def problem(
        self, signature: GatingSignature, tokens: int, routing: RoutingSpec, model: ModelShape | None = None
    ) -> GatingProblem:
        """Problem of ``tokens`` tokens; ``model`` has no part in it, for signatures hold the experts of all ranks."""
        del model
        return GatingProblem(signature, tokens, routing)

    def weights(self, signature: GatingSignature, seed: int) -> Arrays:
        """The selection bias, where there is one."""
        del seed
        return {"bias": generate_bias(signature)} if signature.bias else {}

    def input_bytes(self, problem: GatingProblem) -> int:
        """Logits."""
        return 4 * problem.tokens * problem.signature.experts

    def inputs(self, problem: GatingProblem, seed: int) -> Arrays:
        """Logits whose choices do not depend on rounding."""
        signature = problem.signature
        bias = generate_bias(signature) if signature.bias else None
        return {"logits": generate_logits(problem.routing, signature, problem.tokens, seed, bias, tied=problem.tied)}

    def reference(self, signature: GatingSignature, weights: Arrays, inputs: Arrays) -> Arrays:
        """Ids by a stable sort in float64, weights in float64, orders by numpy."""
        logits: NDArray[np.float32] = inputs["logits"]
        keys = logits.astype(np.float64)
        if signature.ranks_by_score:
            keys = biased_scores(logits, weights.get("bias"))
        if signature.groups > 1:
            keys = _in_best_groups(keys, signature)
        ids = np.argsort(-keys, axis=1, kind="stable")[:, : signature.top_k].astype(np.int32)
        return {"topk_ids": ids, "topk_weights": _weights(logits, ids, signature), **_orders(ids, signature)}

    def tolerance(self, signature: GatingSignature) -> float:
        """Of the weights: an exponential to 3e-7, a sum of up to ``experts`` of them, and a division."""
        del signature
        return 3e-6

    def workload(self, problem: GatingProblem, inputs: Arrays) -> Workload:
        """A comparison per logit, and the exponentials that the weights need; every tensor moves once."""
        signature, logits = problem.signature, inputs["logits"]
        choices = problem.tokens * signature.top_k
        all_scores = signature.ranks_by_score or (signature.score == "softmax" and not signature.renormalize)
        exponentials = logits.size if all_scores else choices
        elements = logits.size + choices * (2 if signature.order == "none" else 4)
        return Workload(flops=float(logits.size + 16 * exponentials), min_bytes=4.0 * elements)

    def awkward_problems(self, signature: GatingSignature) -> tuple[GatingProblem, ...]:
        """One token, an odd count with many equal logits, and popular experts."""
        return (
            GatingProblem(signature, 1, RoutingSpec.parse("balanced")),
            GatingProblem(signature, 37, RoutingSpec.parse("balanced"), tied=True),
            GatingProblem(signature, 75, RoutingSpec.parse("power-law:2")),
        )


def _in_best_groups(keys: NDArray[np.float64], signature: GatingSignature) -> NDArray[np.float64]:
    """``keys`` with -inf for experts outside the best groups."""
    scores = group_scores(keys, signature)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : signature.top_groups]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, values=True, axis=1)
    return np.where(np.repeat(chosen, signature.group_size, axis=1), keys, -np.inf)


def _weights(logits: NDArray[np.float32], ids: NDArray[np.int32], signature: GatingSignature) -> NDArray[np.float64]:
    if signature.score == "sigmoid":
        scores = biased_scores(logits, None)
    else:
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    chosen: NDArray[np.float64] = np.take_along_axis(scores, ids.astype(np.int64), axis=1)
    if signature.renormalize:
        chosen /= chosen.sum(axis=1, keepdims=True)
    return chosen * signature.scale


def _orders(ids: NDArray[np.int32], signature: GatingSignature) -> Arrays:
    if signature.order == "none":
        return {}
    order = sort_tokens(ids, signature.experts)
    arrays: Arrays = {
        "expert_offsets": order.expert_offsets,
        "row_token": order.row_token.reshape(ids.shape),
        "slot_row": order.slot_row,
    }
    if signature.order == "blocks":
        blocks = pad_blocks(order, signature.block_size, signature.padded_rows(len(ids)))
        arrays |= {
            "sorted_slots": blocks.sorted_slots,
            "block_experts": blocks.block_experts,
            "padded_rows": np.array([blocks.padded_rows], np.int32),
        }
    return arrays


def _signature(router: RouterLayers) -> GatingSignature:
    return GatingSignature(
        experts=router.experts,
        top_k=router.top_k,
        score=router.score,
        renormalize=router.renormalize,
        bias=router.bias,
        groups=router.groups,
        top_groups=router.top_groups,
        scale=router.scale,
        order="rows",
    )
