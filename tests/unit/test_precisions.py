"""Precisions as data: how many rows of words a panel takes, what divides k, and names from the command line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.hardware.archs import ARCHS, CPU_ARCHS
from tilewright.codegen.numbers.activation_rounding import round_activations
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.numbers.precisions import (
    CPU_PRECISIONS,
    INTEGER_PRECISIONS,
    find_precision,
    parse_precisions,
)
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError

precisions = st.sampled_from([find_precision(name) for name in CPU_PRECISIONS])


@pytest.mark.parametrize(
    ("name", "k", "rows"),
    [
        ("fp32", 5, 5),
        ("bf16", 5, 3),
        ("int8", 5, 2 + 1),
        ("int8", 1, 1 + 1),
        ("fp8_e4m3", 8, 2 + 1),
        ("int8g32", 64, 2 * (8 + 1)),
        ("int4g32", 64, 2 * (4 + 1)),
        ("int4g128", 256, 2 * (16 + 1)),
        ("mxfp4", 128, 1 + 4 * 4),  # four exponents share a word
        ("mxfp4", 160, 1 + 4 * 4 + 1 + 4),
    ],
)
def test_rows_by_hand(name: str, k: int, rows: int) -> None:
    assert find_precision(name).rows(k) == rows


@given(precisions, st.integers(1, 1000))
def test_groups_cover_k_or_the_precision_refuses_it(precision, k: int) -> None:
    refusal = precision.refusal(k)
    if refusal is None:
        assert precision.groups(k) * precision.group(k) == k
        assert 0 <= precision.group_rows(k) * precision.steps - precision.group(k) < precision.steps
    else:
        assert f"k={k} is no multiple of the {precision.group(k)} steps" in refusal
        assert precision.name in refusal


def test_bits_per_weight_of_a_long_panel() -> None:
    bits = {name: 32 * find_precision(name).rows(4096) / 4096 for name in CPU_PRECISIONS}
    assert bits == {
        "fp32": 32,
        "bf16": 16,
        "int8": 8 + 32 / 4096,
        "int8g128": 8.25,
        "int8g64": 8.5,
        "int8g32": 9,
        "fp8_e4m3": 8 + 32 / 4096,
        "int4g128": 4.25,
        "int4g64": 4.5,
        "int4g32": 5,
        "mxfp4": 4.25,
    }


def test_integer_precisions_store_weights_like_those_of_floats() -> None:
    for name in INTEGER_PRECISIONS:
        integers, floats = find_precision(name), find_precision(name.removesuffix("_a8"))
        assert (integers.dtype, integers.scales) == (floats.dtype, floats.scales)


def test_activations_are_rounded_to_127_steps_of_their_row() -> None:
    x = np.array([[1.0, -127.0, 2.5, 3.5], [0, -0.0, 0, 0], [1e-35, 0, 0, 1e-32], [0.5, 0.25, 0, -0.125]], np.float32)
    scale = np.float32(0.5) / np.float32(127)
    expected = [[1, -127, 2, 4], [0, 0, 0, 0], [0, 0, 0, 0], [127 * scale, 64 * scale, 0, -32 * scale]]
    rounded = round_activations(x, find_precision("int8_a8"))
    np.testing.assert_array_equal(rounded, np.array(expected, np.float32))
    np.testing.assert_array_equal(round_activations(x, find_precision("int8g32")), x)


def test_sums_of_integers_are_bounded() -> None:
    assert find_precision("int8_a8").refusal(133_144) is None
    assert "do not fit the 32 bits" in str(find_precision("int8_a8").refusal(133_145))
    assert find_precision("int8").refusal(133_145) is None


def test_integer_products_are_offered_where_the_cpu_has_them() -> None:
    op = find_op("moe_gemm")
    signature = MoeGemmSignature(stage="plain", experts=2, n=64, k=64)
    for arch in CPU_ARCHS.values():
        refusal = op.precisions(signature, arch)["int8_a8"]
        assert (refusal is None) == bool(arch.dot), arch.name
    missing = "a CPU with asimddp has, and is aarch64_neon_dotprod"
    with pytest.raises(TilewrightError, match=missing):
        op.space(signature, ARCHS["aarch64_neon"], precisions=("int8_a8",))
    assert missing in op.precisions(signature, ARCHS["aarch64_neon"])["int8_a8"]
    assert "impossible on sm_90" in op.precisions(signature, ARCHS["sm_90"])["int8_a8"]


def test_layout_keys_name_the_precision() -> None:
    assert WeightLayout(8, precision="int4g32").key == "panel8_int4g32"
    assert len({WeightLayout(8, precision=name).key for name in CPU_PRECISIONS}) == len(CPU_PRECISIONS)


def test_names_are_parsed_once_each() -> None:
    assert parse_precisions("int8, fp32,int8") == ("int8", "fp32")


@pytest.mark.parametrize(
    ("text", "said"), [("int3", "unknown precision 'int3'; known precisions: fp32, bf16"), (",", "names no precision")]
)
def test_what_is_no_precision_is_named(text: str, said: str) -> None:
    with pytest.raises(TilewrightError, match=said):
        parse_precisions(text)


def test_an_unknown_precision_makes_no_layout() -> None:
    with pytest.raises(TilewrightError, match="unknown precision 'fp3'"):
        WeightLayout(8, precision="fp3")
