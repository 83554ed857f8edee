"""What ops' gains come to in a forward pass."""

import pytest

from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.tuner.plan.deployed import Deployed
from tilewright.tuner.report.end_to_end import not_counted, passes, telling_names

MODEL = load_model("gpt-oss-20b")  # 24 layers, all with experts, half of them with a window
SIGNATURES = {name: op.signatures(MODEL) for name, op in OPS.items()}


def raced(tokens: int, torch_us: float, speedup: float, noise: float = 0.0) -> Deployed:
    """Six times of each, so that the interval is the range: the served ones are off by ``noise`` once each way."""
    served_us = [torch_us / (speedup * factor) for factor in (1, 1 - noise, 1, 1, 1 + noise, 1)]
    return Deployed(tokens, tuple(served_us), (torch_us,) * 6, None, error=0.0)


def test_calls_are_counted_per_layer_and_phase():
    measured = [(s, [raced(4, 10.0, 2.0)]) for op in OPS for s in SIGNATURES[op]]
    decode, prefill = passes(MODEL, measured)
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    # up, down and gating in 24 layers; attention in 12 with a window and 12 without
    assert decode.torch_us == prefill.torch_us == pytest.approx(10.0 * (3 * 24 + 2 * 12))
    assert decode.gain == pytest.approx((2.0, 2.0, 2.0))
    assert decode.without("attention").torch_us == pytest.approx(10.0 * 3 * 24)


def test_a_pass_is_stated_only_where_every_op_was_measured():
    up, down = SIGNATURES["moe_gemm"]
    found = passes(MODEL, [(up, [raced(1, 5.0, 2.0), raced(4, 9.0, 2.0)]), (down, [raced(4, 9.0, 1.0)])])
    assert [(each.phase, each.tokens) for each in found] == [("decode", 4), ("prefill", 4)]
    assert passes(MODEL, []) == []


def test_the_noise_of_parts_adds_in_quadrature():
    up, down = SIGNATURES["moe_gemm"]
    one = passes(MODEL, [(up, [raced(1, 100.0, 2.0, noise=0.1)])])[0]
    median, low, high = one.gain
    assert (median, low, high) == pytest.approx((2.0, 1.8, 2.2))
    both = passes(MODEL, [(stage, [raced(1, 100.0, 2.0, noise=0.1)]) for stage in (up, down)])[0]
    assert both.gain[0] == pytest.approx(2.0)
    assert low < both.gain[1] < 2.0 < both.gain[2] < high


def test_linear_layers_outside_of_experts_are_counted():
    qwen, moe = load_model("qwen3-30b-a3b"), OPS["moe_gemm"]
    counts = {
        (s.n, s.k): tuple(moe.calls_per_pass(s, qwen, phase) for phase in ("decode", "prefill"))
        for s in moe.further_signatures(qwen)
    }
    assert counts == {
        (4096, 2048): (48, 48),
        (512, 2048): (96, 96),
        (2048, 4096): (48, 48),
        (151936, 2048): (1, 0),
    }
    problem = moe.problem(moe.further_signatures(qwen)[0], 5, RoutingSpec.parse("balanced"), qwen)
    assert moe.inputs(problem, seed=0)["x"].shape == (5, 2048)


def named(model, signatures):
    """What is not counted beside ``signatures``."""
    left_out = not_counted(model, signatures)
    assert all(each.why for each in left_out)
    return {each.what for each in left_out}


def test_what_is_left_out_is_named():
    every = [signature for signatures in SIGNATURES.values() for signature in signatures]
    assert {"attention", "gating"} <= named(MODEL, SIGNATURES["moe_gemm"])
    assert "experts" in named(MODEL, SIGNATURES["gating"])
    assert "shared experts" in named(load_model("deepseek-v3"), every)
    assert not {"experts", "gating", "attention"} & named(MODEL, every)
    assert {"projections", "the head"} <= named(MODEL, every)
    assert not any(s.n == 4096 for s in OPS["moe_gemm"].further_signatures(MODEL))  # gpt-oss' projections have a bias
    with_head = named(MODEL, [*every, *OPS["moe_gemm"].further_signatures(MODEL)])
    assert "projections" in with_head
    assert "the head" not in with_head
    qwen = load_model("qwen3-30b-a3b")
    assert not {"projections", "the head"} & named(qwen, OPS["moe_gemm"].further_signatures(qwen))
    assert {"projections", "the head"} <= named(qwen, OPS["moe_gemm"].signatures(qwen))


def test_parts_that_share_a_title_say_how_they_differ():
    decode = [signature for signature in SIGNATURES["attention"] if signature.stage == "decode"]
    assert set(telling_names(decode).values()) == {"attention decode window=0", "attention decode window=128"}
    assert set(telling_names(decode[:1]).values()) == {"attention decode"}


def test_a_gain_has_no_interval_where_a_part_has_none():
    up, down = SIGNATURES["moe_gemm"]
    few = Deployed(1, (5.0,) * 5, (10.0,) * 5, None, error=0.0)
    one = passes(MODEL, [(up, [raced(1, 100.0, 2.0)]), (down, [few])])[0]
    assert one.gain == (pytest.approx(2.0), None, None)
