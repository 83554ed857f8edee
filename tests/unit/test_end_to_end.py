"""What ops' gains come to in a forward pass."""

import pytest

from tilewright.codegen.models import load_model
from tilewright.codegen.ops import OPS
from tilewright.tuner.deployed import Deployed
from tilewright.tuner.end_to_end import not_counted, passes
from tilewright.tuner.evaluation.statistics import Interval

MODEL = load_model("gpt-oss-20b")  # 24 layers, all with experts, half of them with a window
SIGNATURES = {name: op.signatures(MODEL) for name, op in OPS.items()}


def raced(tokens: int, torch_us: float, speedup: float, noise: float = 0.0) -> Deployed:
    once = Interval(torch_us, torch_us, torch_us)
    low, high = speedup * (1 - noise), speedup * (1 + noise)
    return Deployed(tokens, once, once, speedup, low, high, rounds=9, error=0.0)


def test_calls_are_counted_per_layer_and_phase():
    measured = [(s, [raced(4, 10.0, 2.0)]) for op in OPS for s in SIGNATURES[op]]
    decode, prefill = passes(MODEL, measured)
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    # up, down and gating in 24 layers; attention in 12 with a window and 12 without
    assert decode.torch_us == prefill.torch_us == pytest.approx(10.0 * (3 * 24 + 2 * 12))
    assert decode.gain == pytest.approx((2.0, 2.0, 2.0))


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


def test_what_is_left_out_is_named():
    assert "attention" in not_counted(MODEL, ["moe_gemm", "gating"])
    assert "shared experts" in not_counted(load_model("deepseek-v3"), list(OPS))
    assert not {"experts", "gating", "attention"} & set(not_counted(MODEL, list(OPS)))
