"""Short floating-point types: their codes are what the formats say, and rounding takes the nearest, ties to even."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.numbers.dtypes import (
    ITEMSIZE,
    e2m1_bits,
    e2m1_values,
    e4m3_bits,
    e4m3_values,
    e8m0_values,
    from_bytes,
    round_to,
    to_bytes,
)
from tilewright.runtime.weights.quantising import encode

CODES = np.arange(256, dtype=np.uint8)
FORMATS = {"fp8_e4m3": (4, 3, 7, 448.0), "fp4_e2m1": (2, 1, 1, 6.0), "bf16": (8, 7, 127, np.inf)}
"""Bits of exponent and mantissa, bias, where it saturates."""


def magnitudes(dtype: str) -> list[float]:
    """All numbers of a format that are not below zero, in the order of their codes; after its definition."""
    exponent_bits, mantissa_bits, bias, largest = FORMATS[dtype]
    found = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        normal = 1 if exponent else 0
        found.append((normal + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - bias))
    return [each for each in found if each <= largest]


def nearest(value: float, dtype: str) -> tuple[float, int]:
    """The number next to ``value``, of two the one with the even code, and that code without the sign."""
    numbers = magnitudes(dtype)
    code = min(range(len(numbers)), key=lambda each: (abs(abs(value) - numbers[each]), each % 2))
    return float(np.copysign(numbers[code], value)), code


SHORT = st.floats(-600, 600, width=32) | st.floats(-0.015625, 0.015625, width=32) | st.floats(width=32, allow_nan=False)


def halfway(dtype: str) -> list[float]:
    """Every tie, and the floats on its two sides."""
    numbers = magnitudes(dtype)
    ties = np.array([(low + high) / 2 for low, high in itertools.pairwise(numbers)], np.float32)
    return [
        float(s * e) for tie in ties for e in (tie, np.nextafter(tie, np.float32(0)), tie * 1.0001) for s in (1, -1)
    ]


def assert_rounds(value: float, dtype: str) -> None:
    rounded = round_to(np.array([value], np.float32), dtype)
    expected, code = nearest(min(max(value, -1e9), 1e9), dtype)
    assert (rounded[0], np.signbit(rounded[0])) == (expected, np.signbit(np.float32(value)))
    bits = {"fp8_e4m3": e4m3_bits, "fp4_e2m1": e2m1_bits}[dtype]
    sign = {"fp8_e4m3": 0x80, "fp4_e2m1": 8}[dtype]
    for values in (rounded, np.array([value], np.float32)):
        assert bits(values)[0] == code + (sign if value < 0 and code else 0)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp4_e2m1"])
@given(value=SHORT)
def test_the_nearest_number_is_taken(dtype: str, value: float) -> None:
    assert_rounds(value, dtype)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp4_e2m1"])
def test_ties_go_to_even_and_what_is_too_large_saturates(dtype: str) -> None:
    for value in [*halfway(dtype), np.inf, -np.inf, 1e30, 448, 449, 464, 465, 6, 7, -8, 2.0**-10, 2.0**-11]:
        assert_rounds(value, dtype)


@given(value=st.floats(width=32, allow_nan=False))
def test_bf16_is_the_nearest_of_the_numbers_with_sixteen_bits(value: float) -> None:
    (rounded,) = round_to(np.array([value], np.float32), "bf16")
    low = np.array([np.abs(np.float32(value))]).view(np.uint32) >> 16
    with np.errstate(over="ignore"):
        # What lies beyond the largest number is as far from it as if there were one more.
        beneath, above = (float((low + up << 16).astype(np.uint32).view(np.float32)[0]) for up in (0, 1))
    beyond = 2.0**128 if np.isinf(above) else above
    distances = {beneath: abs(value) - beneath, above: beyond - abs(value)} if np.isfinite(value) else {np.inf: 0.0}
    least = min(distances.values())
    allowed = [number for number, distance in distances.items() if distance == least]
    if len(allowed) == 2:
        allowed = [allowed[int(low[0]) % 2]]
    assert abs(rounded) in allowed
    assert np.signbit(rounded) == np.signbit(np.float32(value))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3", "fp4_e2m1"])
def test_a_nan_stays_one_whatever_its_bits(dtype: str) -> None:
    bits = np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0xFFFFFFFF], np.uint32)
    assert np.isnan(round_to(bits.view(np.float32), dtype)).all()


def test_every_code_says_its_number() -> None:
    numbers = magnitudes("fp8_e4m3")
    assert e4m3_values(CODES[: len(numbers)]).tolist() == numbers
    assert e4m3_values(CODES[128 : 128 + len(numbers)]).tolist() == [-each for each in numbers]
    assert np.isnan(e4m3_values(CODES[[0x7F, 0xFF]])).all()
    assert e2m1_values(CODES[:16]).tolist() == [*magnitudes("fp4_e2m1"), *(-each for each in magnitudes("fp4_e2m1"))]
    assert e8m0_values(CODES[:255]).tolist() == [2.0 ** (code - 127) for code in range(255)]


def test_zeros_and_nan_have_codes_without_a_sign() -> None:
    values = np.array([0.0, -0.0, -1e-9, np.nan, -np.nan], np.float32)
    assert e4m3_bits(values).tolist() == [0, 0, 0, 0x7F, 0x7F]
    assert e2m1_bits(values[:3]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8_e4m3"])
def test_what_memory_holds_is_what_was_rounded(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    held = to_bytes(values, dtype)
    assert len(held) == 1000 * ITEMSIZE[dtype]
    read = from_bytes(held, dtype)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, round_to(values, dtype))


def test_bytes_and_integers_are_memory_as_they_are() -> None:
    indices = np.arange(-5, 5, dtype=np.int32)
    assert from_bytes(to_bytes(indices, "int32"), "int32").tolist() == indices.tolist()
    assert to_bytes(CODES, "bf16") == CODES.tobytes()


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=32, max_size=32))
def test_the_runtimes_own_rounding_makes_the_same_codes(weights: list[float]) -> None:
    """It has to do without these modules, and every step is one that its C twin does, too."""
    groups = np.array(weights, np.float32).reshape(1, 1, 32)
    codes, _ = encode(groups, "bf16")
    np.testing.assert_array_equal((codes << 16).view(np.float32), round_to(groups, "bf16"))
    codes, scales = encode(groups, "fp8_e4m3")
    inverse = np.float32(448) / np.abs(groups).max() if scales.any() else np.float32(0)
    np.testing.assert_array_equal(codes, e4m3_bits(groups * inverse))
    codes, exponents = encode(groups, "fp4_e2m1")
    scaled = groups * e8m0_values(254 - exponents)
    np.testing.assert_array_equal(codes & 7, e2m1_bits(scaled) & 7)
