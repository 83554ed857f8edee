"""moe_gemm: grouped GEMM over experts with token routing, the two matrix products of an expert FFN.

Stages, with ``expert(r)`` the expert whose range in ``expert_offsets`` holds row r of the sorted order:

* ``up``: ``out[r] = act(x[row_token[r]] @ weight[expert(r)].T + bias[expert(r)])``, ``act`` joining gate and up columns
* ``down``: ``out[t] = sum_j topk_weights[t, j] * (x[slot_row[t, j]] @ weight[e].T + bias[e])``
* ``plain``: ``out[r] = x[r] @ weight[expert(r)].T + bias[expert(r)]``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import ExpertLayers, LeftOut, LinearLayers
from tilewright.codegen.numbers.activation_rounding import round_activations
from tilewright.codegen.numbers.dtypes import ITEMSIZE, ROUNDING, round_to
from tilewright.codegen.numbers.gates import join_halves
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.base import NOT_ASKED_FOR, Arrays, OpDeclaration, Phase, Workload
from tilewright.codegen.ops.implementation import Implementation
from tilewright.codegen.ops.moe_gemm.cpu.configs import CPU
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.moe_gemm.triton.templates import TRITON
from tilewright.codegen.routing.recorded import read_recorded_ids
from tilewright.codegen.routing.spec import (
    RoutingSpec,
    generate_topk_weights,
)

_SAMPLED_EXPERTS, _SAMPLED_COLUMNS, _SAMPLED_TOKENS = 4, 256, 32


class MoeGemm(OpDeclaration[MoeGemmSignature, MoeGemmProblem]):
    """The declaration of moe_gemm."""

    name: ClassVar[str] = "moe_gemm"
    implementations: ClassVar[tuple[Implementation, ...]] = (CPU, TRITON)
    signature_type: ClassVar[type[MoeGemmSignature]] = MoeGemmSignature
    problem_type: ClassVar[type[MoeGemmProblem]] = MoeGemmProblem
    served_by: ClassVar[tuple[str, ...]] = ("Experts",)
    needed_for: ClassVar[str] = "experts"

    def signatures(self, model: ModelShape) -> tuple[MoeGemmSignature, ...]:
        """``up`` with the activation fused, then ``down``, of every kind of expert layer."""
        return tuple(dict.fromkeys(stage for each in model.experts for stage in _stages(each)))

    def further_signatures(self, model: ModelShape) -> tuple[MoeGemmSignature, ...]:
        """Linear layers outside of the experts, each a group of its own: what ranks share in a known way."""
        return tuple(dict.fromkeys(_plain(each, shape) for each, shape in _linears(model)))

    def calls_per_pass(self, signature: MoeGemmSignature, model: ModelShape, phase: Phase) -> float:
        """Once in every layer with such experts; of linear layers as many as have the shape.

        The head is called for one row of a prompt, which is no size.
        """
        asked = self.declared(signature)
        if asked.stage != "plain":
            return float(sum(each.calls for each in model.experts if asked in _stages(each)))
        alike = [each for each, shape in _linears(model) if _plain(each, shape) == asked]
        return float(sum(each.decode if phase == "decode" else each.prefill for each in alike))

    def left_out(self, tuned: Sequence[MoeGemmSignature], model: ModelShape) -> tuple[LeftOut, ...]:
        """Experts, and the linear layers around them; only the last token of a prompt goes through the head."""
        stages = {each.stage for each in tuned}
        plain = {self.declared(each) for each in tuned if each.stage == "plain"}
        head = [each for each in _linears(model) if each[0].role == "head"]
        others = [each for each in _linears(model) if each[0].role != "head"]
        name = "linear layers" if any(each.role == "other" for each, _ in others) else "projections"
        unknown = [each for each in model.linears if _share(each, model) is None]
        return (
            *((LeftOut("experts", NOT_ASKED_FOR),) if model.experts and not stages - {"plain"} else ()),
            *((LeftOut(name, NOT_ASKED_FOR),) if others and not plain & {_plain(*each) for each in others} else ()),
            *((LeftOut("the head", NOT_ASKED_FOR),) if head and not plain & {_plain(*each) for each in head} else ()),
            *((LeftOut("linear layers", "how ranks share them is not known"),) if unknown else ()),
        )

    def problem(
        self, signature: MoeGemmSignature, tokens: int, routing: RoutingSpec, model: ModelShape | None = None
    ) -> MoeGemmProblem:
        """Problem of ``tokens`` tokens, routed over all experts of ``model`` (of the signature, without one).

        Recorded routing that does not fit is refused here, not when a run has begun.
        """
        # Rows of a plain product are what its caller made of tokens and routing.
        of_model = None if signature.stage == "plain" else model
        problem = MoeGemmProblem(signature, tokens, routing, signature.experts * (of_model.ep if of_model else 1))
        if routing.path is not None:
            read_recorded_ids(routing.path, problem.all_experts, signature.top_k)
        return problem

    def sample(self, problem: MoeGemmProblem) -> MoeGemmProblem:
        """Few experts, columns and tokens, but the whole k."""
        signature = problem.signature
        experts = min(signature.experts, _SAMPLED_EXPERTS)
        small = replace(
            signature, experts=experts, n=min(signature.n, _SAMPLED_COLUMNS), top_k=min(signature.top_k, experts)
        )
        return MoeGemmProblem(small, min(problem.tokens, _SAMPLED_TOKENS), RoutingSpec.parse("balanced"), experts)

    def weights(self, signature: MoeGemmSignature, seed: int) -> Arrays:
        """Normal weights scaled so that sums are of the inputs' magnitude, and a small bias.

        As float32, holding values of the weights' dtype. Where sums are clamped, some have to be: three times larger,
        about one in a hundred lies beyond the limit.
        """
        rows, k = signature.halves * signature.n, signature.k
        scale = k**-0.5 * (3 if signature.activation == "swiglu_clamped" else 1)
        weight = np.empty((signature.experts, rows, k), np.float32)
        streams = np.random.SeedSequence([seed, 1]).spawn(signature.experts)

        def fill(expert: int) -> None:
            rng = np.random.Generator(np.random.SFC64(streams[expert]))
            rng.standard_normal(out=weight[expert], dtype=np.float32)
            weight[expert] *= np.float32(scale)
            weight[expert] = round_to(weight[expert], signature.w_dtype)

        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(fill, range(signature.experts)))
        arrays: Arrays = {"weight": weight}
        if signature.bias:
            rng = np.random.default_rng([seed, 2])
            arrays["bias"] = rng.normal(0, 0.1, (signature.experts, rows)).astype(np.float32)
        return arrays

    def input_bytes(self, problem: MoeGemmProblem) -> int:
        """Activations, a row for every token or for every one of its experts."""
        signature = problem.signature
        return 4 * problem.tokens * signature.k * (1 if signature.stage == "up" else signature.top_k)

    def inputs(self, problem: MoeGemmProblem, seed: int) -> Arrays:
        """Normal activations (float32, of the dtype's values) and routing as the problem's spec draws it."""
        signature = problem.signature
        topk_ids, order = problem.order(seed)
        rng = np.random.default_rng([seed, 3])
        x_rows = problem.tokens if signature.stage == "up" else len(order.row_token)
        arrays: Arrays = {
            "x": round_to(rng.standard_normal((x_rows, signature.k), dtype=np.float32), signature.x_dtype),
            "expert_offsets": order.expert_offsets,
        }
        if signature.stage == "up":
            arrays["row_token"] = order.row_token
        if signature.stage == "down":
            arrays["slot_row"] = order.slot_row
            arrays["topk_weights"] = generate_topk_weights(topk_ids, seed)
        return arrays

    def rounded_inputs(self, signature: MoeGemmSignature, inputs: Arrays, precision: str) -> Arrays:  # noqa: ARG002
        """``inputs`` with the values that kernels of ``precision`` compute with, where it rounds activations, too."""
        return {**inputs, "x": round_activations(inputs["x"], find_precision(precision))}

    def reference(self, signature: MoeGemmSignature, weights: Arrays, inputs: Arrays) -> Arrays:
        """The result in float64, computed by plain torch."""
        import torch

        x = torch.from_numpy(inputs["x"])
        offsets = inputs["expert_offsets"].tolist()
        rows = torch.zeros(offsets[-1], signature.n, dtype=torch.float64)
        for expert in range(signature.experts):
            begin, end = offsets[expert], offsets[expert + 1]
            if begin == end:
                continue
            own = (
                x[torch.from_numpy(inputs["row_token"][begin:end]).long()] if signature.stage == "up" else x[begin:end]
            )
            product = own.double() @ torch.from_numpy(weights["weight"][expert]).double().T
            if signature.bias:
                product += torch.from_numpy(weights["bias"][expert]).double()
            if signature.halves == 2:
                product = join_halves(signature.activation, product[:, : signature.n], product[:, signature.n :])
            rows[begin:end] = product
        if signature.stage != "down":
            return {"out": rows.numpy()}
        slots = torch.from_numpy(inputs["slot_row"]).long()
        scale = torch.from_numpy(inputs["topk_weights"]).double() * (slots >= 0)
        picked = rows[slots.clamp(min=0)] if len(rows) else rows.new_zeros(*slots.shape, signature.n)
        return {"out": torch.einsum("tj,tjn->tn", scale, picked).numpy()}

    def tolerance(self, signature: MoeGemmSignature) -> float:
        """Fp32 sums of k terms in any order: the error grows like sqrt(k) rounding steps. Then the output is rounded.

        It is compared with the largest output; clamps hold that down, but not the error of a sum. Rows of ``down`` may
        be rounded before they are added up, too.
        """
        clamped = 3.0 if signature.activation == "swiglu_clamped" else 1.0
        roundings = 2 if signature.stage == "down" else 1
        return 2e-6 * clamped * max(1.0, math.sqrt(signature.k) / 16) + roundings * ROUNDING[signature.out_dtype]

    def workload(self, problem: MoeGemmProblem, inputs: Arrays) -> Workload:
        """Two flops per multiply-add; every active expert's weights, the inputs and the output move once."""
        signature = problem.signature
        counts = np.diff(inputs["expert_offsets"])
        rows = int(counts.sum())
        columns = signature.halves * signature.n
        out_rows = problem.tokens if signature.stage == "down" else rows
        elements = int((counts > 0).sum()) * columns * signature.k + inputs["x"].size
        nbytes = ITEMSIZE[signature.x_dtype] * elements + ITEMSIZE[signature.out_dtype] * out_rows * signature.n
        return Workload(flops=2.0 * rows * columns * signature.k, min_bytes=float(nbytes))

    def awkward_problems(self, signature: MoeGemmSignature) -> tuple[MoeGemmProblem, ...]:
        """One token (empty experts), odd counts of which other ranks compute a part, and one hot expert."""
        # Under expert parallelism tokens may pick more experts than this rank holds.
        experts = max(signature.experts, signature.top_k)
        odd = (2 * experts // signature.top_k + 3) | 1
        return (
            MoeGemmProblem(signature, 1, RoutingSpec.parse("balanced"), experts),
            MoeGemmProblem(signature, odd, RoutingSpec.parse("power-law"), 2 * experts),
            MoeGemmProblem(signature, 37, RoutingSpec.parse("power-law:8"), experts),
        )


@lru_cache(maxsize=64)
def _stages(experts: ExpertLayers) -> tuple[MoeGemmSignature, MoeGemmSignature]:
    up = MoeGemmSignature(
        stage="up",
        experts=experts.experts,
        n=experts.inter,
        k=experts.hidden,
        top_k=experts.top_k,
        activation=experts.activation,
        bias=experts.bias,
    )
    return up, replace(up, stage="down", n=experts.hidden, k=experts.inter, activation="none")


def _linears(model: ModelShape) -> list[tuple[LinearLayers, tuple[int, int]]]:
    """Linear layers with their (n, k) on one tensor-parallel rank."""
    shares = [(each, _share(each, model)) for each in model.linears]
    return [(each, shape) for each, shape in shares if shape is not None]


def _share(linear: LinearLayers, model: ModelShape) -> tuple[int, int] | None:
    """(n, k) of a rank's part of ``linear``; None where it is not known. Heads are divided, and the head is not."""
    if model.tp == 1 or linear.role == "head":
        return linear.n, linear.k
    for attention in model.attention:
        heads, kv_heads = model.heads_per_rank(attention)
        match linear.role:
            case "query" if linear.n == attention.heads * attention.head_dim:
                return heads * attention.head_dim, linear.k
            case "key" if linear.n == attention.kv_heads * attention.head_dim:
                return kv_heads * attention.head_dim, linear.k
            case "value" if linear.n == attention.kv_heads * attention.value_dim:
                return kv_heads * attention.value_dim, linear.k
            case "output" if linear.k == attention.heads * attention.value_dim:
                return linear.n, heads * attention.value_dim
    return None


def _plain(linear: LinearLayers, shape: tuple[int, int]) -> MoeGemmSignature:
    return MoeGemmSignature(stage="plain", experts=1, n=shape[0], k=shape[1], bias=linear.bias)
