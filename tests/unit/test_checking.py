"""Comparing outputs with references."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilewright.tuner.evaluation.checking import compare

REFERENCE = np.random.default_rng(0).normal(size=(300, 7, 601))


def output() -> np.ndarray:
    return REFERENCE.astype(np.float32)


def test_rounding_is_allowed_and_its_size_told() -> None:
    comparison = compare(output(), REFERENCE, 1e-6)
    assert comparison.complaint is None
    assert 0 < comparison.error < 1e-7


@pytest.mark.parametrize("index", [(0, 0, 0), (299, 6, 600), (249, 1, 88)])
def test_one_wrong_element_is_found_wherever_it_is(index: tuple[int, int, int]) -> None:
    out = output()
    out[index] += 0.01
    comparison = compare(out, REFERENCE, 1e-6)
    assert comparison.error == pytest.approx(0.01 / np.abs(REFERENCE).max(), rel=1e-3)
    assert comparison.complaint is not None
    assert comparison.complaint.startswith(f"out{list(index)} is ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_wrong(value: float) -> None:
    out = output()
    out[5, 3, 2] = value
    comparison = compare(out, REFERENCE, 1e-6)
    assert comparison.error == math.inf
    assert comparison.complaint is not None
    assert f"out[5, 3, 2] is {value:g}" in comparison.complaint


def test_an_element_that_was_not_written_is_called_so() -> None:
    out = output()
    out.view(np.uint32)[7, 0, 0] = 0xFFFFFFFF
    complaint = compare(out, REFERENCE, 1e-6).complaint
    assert complaint is not None
    assert "out[7, 0, 0] was never written" in complaint


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    zeros = np.zeros((2, 3))
    assert compare(np.zeros((2, 3), np.float32), zeros, 1e-6).complaint is None
    assert compare(np.full((2, 3), 1e-3, np.float32), zeros, 1e-6).error == pytest.approx(1e-3)


def test_an_empty_output_is_right() -> None:
    assert compare(np.empty((0, 4), np.float32), np.empty((0, 4)), 1e-6).complaint is None
