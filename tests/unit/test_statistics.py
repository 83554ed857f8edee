"""Medians, intervals and comparisons."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuner.evaluation.statistics import (
    Ratio,
    clearly_slower,
    median_interval,
    paired_ratio,
)


def coverage(count: int, rank: int) -> Fraction:
    """Exact probability that the median lies between order statistics ``rank`` and its mirror image."""
    return 1 - 2 * Fraction(sum(math.comb(count, below) for below in range(rank + 1)), 2**count)


@given(st.integers(6, 600))
def test_interval_is_the_narrowest_that_covers_95_percent(count: int) -> None:
    interval = median_interval(range(count))
    assert interval.low is not None
    rank = int(interval.low)
    assert interval.high == count - 1 - rank
    assert coverage(count, rank) >= Fraction(95, 100)
    assert coverage(count, rank + 1) < Fraction(95, 100)


@given(st.lists(st.floats(1e-3, 1e9), min_size=6, max_size=60))
def test_interval_holds_the_median_and_knows_no_order(samples: list[float]) -> None:
    interval = median_interval(samples)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low <= interval.median <= interval.high
    assert interval == median_interval(samples[::-1])


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=5))
def test_fewer_than_six_samples_carry_no_interval(samples: list[float]) -> None:
    interval = median_interval(samples)
    assert (interval.low, interval.high, interval.half_width) == (None, None, None)
    assert interval.samples == len(samples)
    ratio = paired_ratio(samples, samples)
    assert (ratio.median, ratio.low, ratio.high, ratio.noise) == (1.0, None, None, None)


def test_interval_ignores_outliers() -> None:
    samples = [10.0] * 30 + [1e6] * 5
    assert median_interval(samples).high == 10.0
    assert median_interval(samples).half_width == 0.0


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        median_interval([])


def test_pairing_cancels_what_both_sides_suffered() -> None:
    random = np.random.default_rng(0)
    weather = np.exp(random.normal(0, 0.5, 101))
    ratio = paired_ratio(0.9 * weather, weather)
    assert ratio.median == pytest.approx(0.9)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.high - ratio.low < 1e-9
    assert ratio.pairs == 101


def test_surplus_samples_of_one_side_are_left_out() -> None:
    assert paired_ratio([2.0, 2.0, 99.0], [1.0, 1.0]) == Ratio(2.0, None, None, 2)
    assert paired_ratio([2.0] * 7 + [99.0], [1.0] * 7) == Ratio(2.0, 2.0, 2.0, 7)


def test_noise_is_the_largest_deviation_from_one() -> None:
    assert Ratio(1.01, 0.98, 1.05, 30).noise == pytest.approx(0.05)
    assert Ratio(0.99, 0.93, 1.02, 30).noise == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("factor", "pairs", "expected"),
    [(3.1, 1, True), (2.0, 1, False), (1.6, 2, True), (1.4, 2, False), (1.1, 5, True), (1.05, 5, False)],
)
def test_few_pairs_need_a_wide_gap(factor: float, pairs: int, expected: bool) -> None:
    best = np.full(pairs, 100.0)
    assert clearly_slower(factor * best, best, margin=0.01) is expected


def test_one_good_pair_saves_a_contestant_with_few() -> None:
    best = np.full(4, 100.0)
    assert not clearly_slower(np.array([300.0, 300.0, 101.0, 300.0]), best, margin=0.01)


def test_many_pairs_tell_small_differences_apart() -> None:
    random = np.random.default_rng(1)
    noise, other_noise = random.lognormal(0, 0.03, (2, 60))
    assert clearly_slower(104 * noise, 100 * other_noise, margin=0.01)
    assert not clearly_slower(100 * noise, 100 * other_noise, margin=0.01)
