"""The declaration of gating: its reference against a loop over tokens and against torch, its inputs, its fields."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.gating.declaration import Gating
from tilewright.codegen.ops.gating.inputs import unstable_tokens
from tilewright.codegen.ops.gating.problem import GatingProblem
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec, pad_blocks, sort_tokens
from tilewright.errors import TilewrightError

OP = Gating()
BALANCED = RoutingSpec.parse("balanced")


@st.composite
def problems(draw: st.DrawFn) -> GatingProblem:
    routing = draw(st.sampled_from(["balanced", "power-law:1", "power-law:8"]))
    return GatingProblem(
        examples_of("gating").random_signature(draw(st.randoms(use_true_random=False))),
        draw(st.integers(1, 20)),
        RoutingSpec.parse(routing),
        draw(st.booleans()),
    )


def naive(signature: GatingSignature, bias, logits) -> tuple[list[int], list[float]]:
    """Ids and weights of one token, straight from the definition."""
    experts = range(signature.experts)
    sigmoid = [1 / (1 + np.exp(-float(x))) for x in logits]
    exponential = [np.exp(float(x) - float(max(logits))) for x in logits]
    score = sigmoid if signature.score == "sigmoid" else [x / sum(exponential) for x in exponential]
    key = [sigmoid[e] + bias[e] for e in experts] if signature.ranks_by_score else [float(x) for x in logits]
    size = signature.group_size
    group_key = []
    for g in range(signature.groups):
        members = sorted(key[g * size : (g + 1) * size], reverse=True)
        group_key.append(members[0] + members[1] if signature.score == "sigmoid" and len(members) > 1 else members[0])
    chosen_groups = sorted(range(signature.groups), key=lambda g: (-group_key[g], g))[: signature.top_groups]
    allowed = [e for e in experts if e // size in chosen_groups]
    ids = sorted(allowed, key=lambda e: (-key[e], e))[: signature.top_k]
    total = sum(score[e] for e in ids) if signature.renormalize else 1.0
    return ids, [signature.scale * score[e] / total for e in ids]


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(0, 9))
def test_reference_is_the_loop_over_tokens(problem: GatingProblem, seed: int) -> None:
    signature = problem.signature
    weights, inputs = OP.weights(signature, seed), OP.inputs(problem, seed)
    outputs = OP.reference(signature, weights, inputs)
    bias = weights.get("bias", np.zeros(signature.experts)).astype(float)
    for token, logits in enumerate(inputs["logits"]):
        ids, expected = naive(signature, bias, logits)
        assert outputs["topk_ids"][token].tolist() == ids
        np.testing.assert_allclose(outputs["topk_weights"][token], expected, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 9))
def test_arrays_have_the_declared_shapes_and_dtypes(problem: GatingProblem, seed: int) -> None:
    signature = problem.signature
    weights, inputs = OP.weights(signature, seed), OP.inputs(problem, seed)
    arrays = {**weights, **inputs, **OP.reference(signature, weights, inputs)}
    specs = OP.tensors(signature)
    assert [spec.name for spec in specs] == [spec.name for spec in specs if spec.name in arrays]
    assert len(specs) == len(arrays)
    sizes = {"tokens": problem.tokens, **problem.output_sizes}
    for spec in specs:
        assert arrays[spec.name].shape == tuple(sizes.get(dim, dim) for dim in spec.dims)
        kind = {"fp32": "f", "int32": "i"}[spec.dtype]
        assert arrays[spec.name].dtype.kind == kind
    work = OP.workload(problem, inputs)
    assert work.flops >= inputs["logits"].size
    assert work.min_bytes >= inputs["logits"].nbytes


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_choice_depends_on_rounding(problem: GatingProblem) -> None:
    signature = problem.signature
    logits, bias = OP.inputs(problem, 1)["logits"], OP.weights(signature, 1).get("bias")
    assert not unstable_tokens(logits, signature, bias).any()
    assert (OP.inputs(problem, 1)["logits"] == logits).all()
    if signature.ranks_by_score:
        # What fp32 makes of the same scores ranks them alike.
        scores = torch.sigmoid(torch.from_numpy(logits)) + (0 if bias is None else torch.from_numpy(bias))
        assume(signature.groups == 1)
        ids = scores.sort(dim=1, descending=True, stable=True).indices[:, : signature.top_k]
        expected = OP.reference(signature, {} if bias is None else {"bias": bias}, {"logits": logits})["topk_ids"]
        assert ids.tolist() == expected.tolist()


def test_a_choice_that_depends_on_rounding_is_found() -> None:
    signature = GatingSignature(experts=4, top_k=2, score="sigmoid", bias=True)
    bias = np.zeros(4, np.float32)
    logits = np.array([[1, 1, 0, 0], [1, np.nextafter(np.float32(1), 2), 0, 0], [2, 1, 0, 0]], np.float32)
    assert unstable_tokens(logits, signature, bias).tolist() == [False, True, False]
    assert unstable_tokens(logits, replace(signature, bias=False), None).tolist() == [False] * 3


@pytest.mark.parametrize(("experts", "top_k"), [(64, 6), (128, 2), (256, 8)])
def test_ties_go_to_the_lower_id_as_in_a_stable_sort(experts: int, top_k: int) -> None:
    problem = GatingProblem(GatingSignature(experts=experts, top_k=top_k), 50, BALANCED, tied=True)
    inputs = OP.inputs(problem, 0)
    outputs = OP.reference(problem.signature, {}, inputs)
    logits = torch.from_numpy(inputs["logits"])
    stable = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert outputs["topk_ids"].tolist() == stable.tolist()
    # torch.topk takes the same values, and any of the experts that have them.
    values, ids = logits.topk(top_k, dim=1)
    assert torch.equal(logits.gather(1, stable), values)
    assert not torch.equal(ids, stable)


def test_recorded_experts_are_chosen_again(tmp_path) -> None:
    path = tmp_path / "ids.npy"
    recorded = np.array([[3, 7, 1], [0, 2, 5]], np.int32)
    np.save(path, recorded)
    for score in ("softmax", "sigmoid"):
        signature = GatingSignature(experts=9, top_k=3, score=score, bias=score == "sigmoid")
        problem = GatingProblem(signature, 4, RoutingSpec.parse(f"recorded:{path}"))
        ids = OP.reference(signature, OP.weights(signature, 0), OP.inputs(problem, 0))["topk_ids"]
        assert np.sort(ids).tolist() == np.sort(np.tile(recorded, (2, 1))).tolist()


def test_power_law_makes_experts_popular() -> None:
    signature = GatingSignature(experts=64, top_k=4)
    spread = {}
    for routing in ("balanced", "power-law:1.5"):
        problem = GatingProblem(signature, 500, RoutingSpec.parse(routing))
        ids = OP.reference(signature, {}, OP.inputs(problem, 0))["topk_ids"]
        spread[routing] = np.bincount(ids.ravel(), minlength=64).max() / (500 * 4 / 64)
    assert spread["balanced"] < 2 < 8 < spread["power-law:1.5"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_blocks_hold_every_slot_once_and_one_expert_each(tokens: int, experts: int, block: int, seed: int) -> None:
    top_k = min(3, experts)
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    signature = GatingSignature(experts=experts, top_k=top_k, order="blocks", block_size=block)
    capacity = signature.padded_rows(tokens)
    blocks = pad_blocks(sort_tokens(ids, experts), block, capacity)
    used = blocks.sorted_slots[: blocks.padded_rows]
    assert blocks.padded_rows % block == 0
    assert sorted(used[used < ids.size].tolist()) == list(range(ids.size))
    assert (blocks.sorted_slots[blocks.padded_rows :] == ids.size).all()
    for number, slots in enumerate(used.reshape(-1, block)):
        real = slots[slots < ids.size]
        assert len(real) > 0
        assert (ids.ravel()[real] == blocks.block_experts[number]).all()
        assert (np.diff(real) > 0).all()
    with pytest.raises(TilewrightError, match="padded rows exceed the"):
        pad_blocks(sort_tokens(ids, experts), block, blocks.padded_rows - block)


@pytest.mark.parametrize("signature", examples_of("gating").signatures, ids=lambda s: s.describe())
def test_signature_and_problems_survive_their_json(signature: GatingSignature) -> None:
    assert find_op("gating").signature_from_dict(json.loads(json.dumps(signature.to_dict()))) == signature
    for problem in OP.awkward_problems(signature):
        assert OP.problem_from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


def test_problem_is_parsed_from_words() -> None:
    words = "experts=256,top_k=8,score=sigmoid,bias=true,groups=8,top_groups=4"
    words += ",scale=2.5,order=blocks,block_size=32,tokens=7"
    problem = OP.parse_problem(dict(pair.split("=") for pair in words.split(",")), BALANCED)
    assert problem.tokens == 7
    assert problem.signature == GatingSignature(
        experts=256,
        top_k=8,
        score="sigmoid",
        bias=True,
        groups=8,
        top_groups=4,
        scale=2.5,
        order="blocks",
        block_size=32,
    )
    assert OP.parse_problem(dict(p.split("=") for p in OP.problem_example.split(",")), BALANCED).tokens == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("experts=8", "--problem lacks top_k"),
        ("experts=8,top_k=9", "top_k=9 is impossible; give a whole number from 1 to 8"),
        ("experts=0,top_k=1", "experts=0 is impossible"),
        ("experts=8,top_k=x", "top_k='x' is impossible; give a whole number"),
        ("experts=8,top_k=2,tokens=many", "tokens='many' is impossible; give a whole number"),
        ("experts=8,top_k=2,tokens=0", "tokens=0 is impossible"),
        ("experts=8,top_k=2,score=tanh", "score='tanh' is impossible; give softmax or sigmoid"),
        ("experts=8,top_k=2,order=columns", "order='columns' is impossible; give none, rows or blocks"),
        ("experts=8,top_k=2,order=blocks", "block_size=0 is impossible"),
        ("experts=8,top_k=2,block_size=4", "block_size=4 is impossible; give 0"),
        ("experts=8,top_k=2,bias=true", "only with score=sigmoid"),
        ("experts=8,top_k=2,bias=perhaps", "bias='perhaps' is impossible; give true or false"),
        ("experts=8,top_k=2,groups=3", "groups=3 does not divide the 8 experts"),
        ("experts=8,top_k=5,groups=2", "top_k=5 is impossible with top_groups=1 groups of 4 experts"),
        ("experts=8,top_k=2,groups=8,top_groups=2,score=sigmoid", "leaves one expert in a group"),
        ("experts=8,top_k=2,scale=0", "scale=0.0 is impossible"),
        ("experts=8,top_k=2,heads=3", "gating has no field 'heads'"),
    ],
)
def test_mistakes_are_named(words: str, said: str) -> None:
    with pytest.raises(TilewrightError) as caught:
        OP.parse_problem(dict(pair.split("=") for pair in words.split(",")), BALANCED)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mixtral-8x7b", GatingSignature(experts=8, top_k=2, order="rows")),
        ("qwen3-30b-a3b", GatingSignature(experts=128, top_k=8, order="rows")),
        ("gpt-oss-20b", GatingSignature(experts=32, top_k=4, order="rows")),
        ("llama-4-scout", GatingSignature(experts=16, top_k=1, score="sigmoid", renormalize=False, order="rows")),
        (
            "deepseek-v3",
            GatingSignature(
                experts=256, top_k=8, score="sigmoid", bias=True, groups=8, top_groups=4, scale=2.5, order="rows"
            ),
        ),
        ("kimi-k2", GatingSignature(experts=384, top_k=8, score="sigmoid", bias=True, scale=2.827, order="rows")),
        ("glm-4.5-air", GatingSignature(experts=128, top_k=8, score="sigmoid", bias=True, order="rows")),
    ],
)
def test_models_route_as_they_were_published(model: str, expected: GatingSignature) -> None:
    assert OP.signatures(load_model(model)) == (expected,)
    # Every rank routes over the experts of all ranks.
    assert OP.signatures(load_model(model, ep=2)) == (expected,)
