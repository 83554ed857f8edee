"""The declaration of moe_gemm: its reference against a loop over tokens, its workload by hand, what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from awkward import problems
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tilewright.codegen.hardware.archs import find_arch
from tilewright.codegen.models.presets import PRESETS
from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.numbers.activations import CLAMPED_LIMIT
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.moe_gemm.problem import MoeGemmProblem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.problem import MAX_SIZE
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError

OP = find_op("moe_gemm")
BALANCED = RoutingSpec.parse("balanced")
SIGNATURE = MoeGemmSignature(stage="down", experts=4, n=3, k=5, top_k=2)
ACTIVATIONS = ["none", "swiglu", "geglu", "swiglu_clamped"]


def activate(name: str, gate: float, up: float) -> float:
    if name == "swiglu":
        return gate / (1 + math.exp(-gate)) * up
    if name == "swiglu_clamped":
        gate = min(gate, 7.0)
        return gate / (1 + math.exp(-1.702 * gate)) * (max(-7.0, min(up, 7.0)) + 1)
    return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def expert_row(signature: MoeGemmSignature, weights: Arrays, expert: int, x: NDArray[Any]) -> NDArray[np.float64]:
    """One row through one expert, one output column at a time."""
    n = signature.n
    sums = [float(np.dot(weights["weight"][expert, c].astype(float), x)) for c in range(signature.halves * n)]
    if signature.bias:
        sums = [value + float(weights["bias"][expert, c]) for c, value in enumerate(sums)]
    if signature.activation != "none":
        sums = [activate(signature.activation, sums[c], sums[n + c]) for c in range(n)]
    return np.array(sums)


def naive(problem: MoeGemmProblem, weights: Arrays, inputs: Arrays) -> NDArray[np.float64]:
    signature, offsets = problem.signature, inputs["expert_offsets"]
    rows = np.zeros((offsets[-1], signature.n))
    for row in range(offsets[-1]):
        expert = max(e for e in range(signature.experts) if offsets[e] <= row)
        x = inputs["x"][inputs["row_token"][row] if signature.stage == "up" else row]
        rows[row] = expert_row(signature, weights, expert, x.astype(float))
    if signature.stage != "down":
        return rows
    out = np.zeros((problem.tokens, signature.n))
    for token in range(problem.tokens):
        for choice in range(signature.top_k):
            row = inputs["slot_row"][token, choice]
            if row >= 0:
                out[token] += float(inputs["topk_weights"][token, choice]) * rows[row]
    return out


@st.composite
def small_problems(draw: st.DrawFn) -> MoeGemmProblem:
    stage = draw(st.sampled_from(["up", "down", "plain"]))
    experts = draw(st.integers(1, 5))
    ranks = draw(st.integers(1, 3))
    signature = MoeGemmSignature(
        stage=stage,
        experts=experts,
        n=draw(st.integers(1, 4)),
        k=draw(st.integers(1, 6)),
        top_k=1 if stage == "plain" else draw(st.integers(1, experts * ranks)),
        activation=draw(st.sampled_from(ACTIVATIONS)) if stage == "up" else "none",
        bias=draw(st.booleans()),
    )
    routing = RoutingSpec.parse(draw(st.sampled_from(["balanced", "power-law", "power-law:8"])))
    return MoeGemmProblem(signature, draw(st.integers(1, 6)), routing, experts * ranks)


@given(small_problems(), st.integers(0, 9))
def test_reference_is_the_loop_over_tokens(problem: MoeGemmProblem, seed: int) -> None:
    weights, inputs = OP.weights(problem.signature, seed), OP.inputs(problem, seed)
    reference = OP.reference(problem.signature, weights, inputs)["out"]
    assert reference.dtype == np.float64
    np.testing.assert_allclose(reference, naive(problem, weights, inputs), rtol=1e-9, atol=1e-12)


@given(small_problems())
def test_arrays_have_the_declared_shapes_and_dtypes(problem: MoeGemmProblem) -> None:
    weights, inputs = OP.weights(problem.signature, 0), OP.inputs(problem, 0)
    arrays = {**weights, **inputs, "out": OP.reference(problem.signature, weights, inputs)["out"]}
    specs = OP.tensors(problem.signature)
    assert {spec.name for spec in specs} == arrays.keys()
    sizes = {"rows": int(inputs["expert_offsets"][-1]), "tokens": problem.tokens}
    for spec in specs:
        assert arrays[spec.name].shape == tuple(sizes.get(dim, dim) for dim in spec.dims), spec.name
        if spec.role != "output":
            assert arrays[spec.name].dtype == {"fp32": np.float32, "int32": np.int32}[spec.dtype], spec.name


@given(small_problems(), st.integers(0, 3))
def test_data_depend_on_the_seed_alone(problem: MoeGemmProblem, seed: int) -> None:
    for made in (OP.weights(problem.signature, seed), OP.inputs(problem, seed)):
        again = OP.weights(problem.signature, seed) if "weight" in made else OP.inputs(problem, seed)
        assert {name: array.tobytes() for name, array in made.items()} == {
            name: array.tobytes() for name, array in again.items()
        }
    assert OP.inputs(problem, seed)["x"].size == 0 or (
        OP.inputs(problem, seed)["x"].tobytes() != OP.inputs(problem, seed + 1)["x"].tobytes()
    )


def test_workload_by_hand() -> None:
    up = MoeGemmSignature(stage="up", experts=4, n=3, k=5, top_k=2, activation="swiglu")
    inputs = OP.inputs(OP.problem(up, 1, BALANCED), 0)
    work = OP.workload(OP.problem(up, 1, BALANCED), inputs)
    # One token, two experts: 2 rows x 6 columns x 5 steps; two weights of 30, x of 5, out of 2 x 3.
    assert work.flops == 2 * 2 * 6 * 5
    assert work.min_bytes == 4 * (2 * 30 + 5 + 6)
    down = replace(up, stage="down", activation="none")
    problem = MoeGemmProblem(down, 3, BALANCED, 4)
    work = OP.workload(problem, OP.inputs(problem, 0))
    # Three tokens, 6 rows over all four experts: 3 columns; x of 6 x 5, out of 3 x 3.
    assert work.flops == 2 * 6 * 3 * 5
    assert work.min_bytes == 4 * (4 * 15 + 30 + 9)


def test_work_of_other_ranks_is_not_counted() -> None:
    problem = MoeGemmProblem(SIGNATURE, 8, BALANCED, 4 * SIGNATURE.experts)
    inputs = OP.inputs(problem, 0)
    rows = int((inputs["slot_row"] >= 0).sum())
    assert 0 < rows < 16
    assert OP.workload(problem, inputs).flops == 2 * rows * 3 * 5


def test_awkward_problems_cover_what_kernels_get_wrong() -> None:
    for signature in examples_of("moe_gemm").signatures:
        awkward = OP.awkward_problems(signature)
        assert {problem.signature for problem in awkward} == {signature}
        assert any(problem.tokens == 1 for problem in awkward)
        counts = [np.diff(OP.inputs(problem, 0)["expert_offsets"]) for problem in awkward]
        assert signature.experts <= signature.top_k or any((rows == 0).any() for rows in counts)
        if signature.stage == "down":
            slots = [OP.inputs(problem, 0)["slot_row"] for problem in awkward]
            assert any((each == -1).any() for each in slots)
            assert any((each >= 0).all() for each in slots) or signature.top_k > signature.experts
        assert len(problems("moe_gemm", signature)) > len(awkward)


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_s_two_signatures_fit_together(name: str) -> None:
    model = load_model(name)
    up, down = OP.signatures(model)
    assert (up.stage, down.stage) == ("up", "down")
    assert (up.k, up.n) == (down.n, down.k) == (model.experts[0].hidden, model.experts[0].inter)
    assert (up.experts, up.top_k) == (down.experts, down.top_k) == (model.experts[0].experts, model.experts[0].top_k)
    assert up.activation != "none"
    assert down.activation == "none"


def test_a_rank_with_fewer_experts_than_a_token_picks_can_be_tuned() -> None:
    model = load_model("mixtral-8x7b", ep=8)
    for signature in OP.signatures(model):
        small = replace(signature, n=8, k=8)
        assert OP.problem(small, 3, BALANCED, model).all_experts == 8
        for problem in (OP.problem(small, 3, BALANCED, model), *OP.awkward_problems(small)):
            OP.inputs(problem, 0)


def test_gpt_oss_has_its_activation_and_bias() -> None:
    up, down = OP.signatures(load_model("gpt-oss-20b"))
    assert (up.activation, up.bias, up.halves) == ("swiglu_clamped", True, 2)
    assert (down.activation, down.bias) == ("none", True)


def test_clamped_sums_are_met_by_the_inputs_that_kernels_are_checked_with() -> None:
    """A kernel that forgot a clamp would be found wrong."""
    signature = MoeGemmSignature(stage="up", experts=4, n=32, k=48, top_k=2, activation="swiglu_clamped")
    problem = OP.problem(signature, 16, BALANCED)
    weights, inputs = OP.weights(signature, 0), OP.inputs(problem, 0)
    sums = np.concatenate(
        [
            inputs["x"][inputs["row_token"][a:b]] @ w.T
            for w, (a, b) in zip(weights["weight"], pairwise(inputs["expert_offsets"]), strict=True)
        ]
    )
    gate, up = sums[:, :32], sums[:, 32:]
    assert (gate > CLAMPED_LIMIT).any()
    assert (up > CLAMPED_LIMIT).any()
    assert (up < -CLAMPED_LIMIT).any()


@given(small_problems())
def test_problem_and_signature_survive_their_json(problem: MoeGemmProblem) -> None:
    fields = json.loads(json.dumps(problem.to_dict()))
    assert OP.problem_from_dict(fields) == problem
    assert OP.signature_from_dict(fields["signature"]) == problem.signature
    assert OP.problem_from_dict(fields).key == problem.key


def test_keys_tell_problems_apart() -> None:
    problem = OP.problem(SIGNATURE, 3, BALANCED)
    others = [
        replace(problem, tokens=4),
        replace(problem, all_experts=8),
        replace(problem, routing=RoutingSpec.parse("power-law")),
        replace(problem, signature=replace(SIGNATURE, n=4)),
    ]
    assert len({each.key for each in [problem, *others]}) == 5
    assert replace(SIGNATURE, bias=True).key != SIGNATURE.key


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        *((name, value, name) for name in ("experts", "n", "k", "top_k") for value in (0, -1, 1.5, "3", True, 1 << 25)),
        ("stage", "sideways", "stage='sideways' is impossible; give up, down or plain"),
        ("activation", "relu", "activation='relu' is impossible; give none, swiglu, geglu or"),
        ("activation", "swiglu", "stage 'down' has no activation"),
        ("stage", "plain", "stage 'plain' knows no routing; leave top_k=2 out"),
        ("bias", 1, "bias=1 is impossible; give true or false"),
        ("x_dtype", "fp8", "x_dtype='fp8' is impossible; give fp32, bf16 or fp16"),
        ("x_dtype", "bf16", "x_dtype=bf16: w_dtype='fp32' is impossible; give bf16"),
        ("w_dtype", "fp8", "w_dtype='fp8'"),
        ("out_dtype", "int32", "out_dtype='int32'"),
    ],
)
def test_an_impossible_signature_names_the_field(field: str, value: object, complaint: str) -> None:
    fields = {**SIGNATURE.to_dict(), field: value}
    with pytest.raises(TilewrightError, match=complaint) as refusal:
        OP.signature_from_dict(fields)
    assert "\n" not in str(refusal.value)


def test_missing_and_unknown_fields_are_named() -> None:
    fields = OP.problem(SIGNATURE, 3, BALANCED).to_dict()
    with pytest.raises(TilewrightError, match="signature has no field 'colour'"):
        OP.signature_from_dict({**fields["signature"], "colour": "red"})
    for missing in ("stage", "experts", "n", "k"):
        with pytest.raises(TilewrightError, match=f"signature lacks the field '{missing}'"):
            OP.signature_from_dict({name: value for name, value in fields["signature"].items() if name != missing})
    for missing in fields:
        with pytest.raises(TilewrightError, match=f"problem lacks the field '{missing}'"):
            OP.problem_from_dict({name: value for name, value in fields.items() if name != missing})


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("tokens", 0, "tokens=0 is impossible"),
        ("tokens", MAX_SIZE + 1, "tokens=1048577 is impossible"),
        ("tokens", "3", "tokens='3' is impossible"),
        ("all_experts", 3, "all_experts=3 is impossible; give at least the 4 of this rank"),
        ("routing", "uniform", "unknown routing 'uniform'"),
    ],
)
def test_an_impossible_problem_names_the_field(field: str, value: object, complaint: str) -> None:
    fields = {**OP.problem(SIGNATURE, 3, BALANCED).to_dict(), field: value}
    with pytest.raises(TilewrightError, match=complaint):
        OP.problem_from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "--problem lacks experts, n, k; give for example experts=8,n=2048"),
        ({"n": "x"}, "n='x' is impossible; give a whole number"),
        ({"tokens": "many"}, "tokens='many' is impossible; give a whole number"),
        ({"tokens": "0"}, "tokens=0 is impossible"),
        ({"experts": "0"}, "experts=0 is impossible"),
        ({"top_k": "9"}, "top_k=9 is impossible; a token cannot pick more than the 4 experts there are"),
        ({"colour": "red"}, "moe_gemm has no field 'colour'; --problem takes tokens, stage, experts"),
        ({"bias": "maybe"}, "bias='maybe' is impossible; give true or false"),
        ({"stage": "middle"}, "stage='middle' is impossible"),
    ],
)
def test_an_impossible_problem_option_names_the_field(fields: dict[str, str], complaint: str) -> None:
    given_fields = {"experts": "4", "n": "3", "k": "5", **fields} if fields else {}
    with pytest.raises(TilewrightError, match=complaint):
        OP.parse_problem(given_fields, BALANCED)


def test_a_problem_option_is_read() -> None:
    text = {"experts": "4", "n": "3", "k": "5", "top_k": "2", "stage": "down", "bias": "true", "tokens": "7"}
    assert OP.parse_problem(text, BALANCED) == OP.problem(replace(SIGNATURE, bias=True), 7, BALANCED)


def test_tolerance_grows_with_the_sum() -> None:
    tolerances = [OP.tolerance(replace(SIGNATURE, k=k)) for k in (1, 256, 1024, 16384)]
    assert tolerances[0] == tolerances[1] < tolerances[2] < tolerances[3] < 1e-4


def test_describe_is_one_line_with_every_field() -> None:
    assert SIGNATURE.describe().startswith("moe_gemm stage=down experts=4 n=3 k=5 top_k=2 activation=none bias=False")


def test_find_op_names_the_known_ones() -> None:
    with pytest.raises(TilewrightError, match="unknown op 'convolution'; known ops: moe_gemm"):
        find_op("convolution")


def test_default_is_a_blocked_kernel_with_packed_weights() -> None:
    config = OP.default_config(SIGNATURE, find_arch("x86_64_avx2"))
    assert config["template"] == "moe_gemm/cpu_blocked"
    assert OP.layout_key(SIGNATURE, config, find_arch("x86_64_avx2")) == "panel16_fp32"
