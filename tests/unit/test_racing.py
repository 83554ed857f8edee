"""Races among simulated contestants, and the rotation of their data."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tilewright.tuner.evaluation.racing import RaceRules, race
from tilewright.tuner.evaluation.rotation import Rotation, input_sets, weight_copies


class Track:
    """Laps of contestants with known times and 2 % noise; its clock counts what they would have taken."""

    def __init__(self, true_us: Sequence[float], sets: int = 1, noise: float = 0.02) -> None:
        self.laps = 0
        self.now_s = 0.0
        self._true_us = true_us
        self._sets = sets
        self._noise = noise
        self._random = np.random.default_rng(0)

    def lap(self, order: Sequence[int]) -> Mapping[int, NDArray[np.float64]]:
        self.laps += 1
        times = {c: self._true_us[c] * self._random.lognormal(0, self._noise, self._sets) for c in order}
        self.now_s += sum(float(values.sum()) for values in times.values()) / 1e6
        return times

    def clock(self) -> float:
        return self.now_s


def test_the_slow_drop_out_and_the_near_best_are_timed_to_the_end() -> None:
    track = Track([1000, 1010, 1500, 4000])
    result = race(
        range(4), track.lap, budget_s=1.0, rules=RaceRules(tight=1e-4), order=random.Random(0), clock=track.clock
    )
    counts = {contestant: len(samples) for contestant, samples in result.samples_us.items()}
    assert 0 in result.finalists
    assert not result.finalists & {2, 3}
    assert counts[3] <= counts[2] < 10 < counts[0] == track.laps


def test_a_race_ends_when_the_medians_are_known() -> None:
    track = Track([100, 100], noise=0.001)
    result = race(range(2), track.lap, budget_s=1e9, rules=RaceRules(), order=random.Random(0), clock=track.clock)
    assert 6 < len(result.samples_us[0]) < 20


def test_a_race_ends_after_so_many_samples() -> None:
    track = Track([100, 100], sets=4, noise=0.5)
    rules = RaceRules(max_samples=40, eliminate=False)
    result = race(range(2), track.lap, budget_s=1e9, rules=rules, order=random.Random(0), clock=track.clock)
    assert [len(samples) for samples in result.samples_us.values()] == [40, 40]


def test_a_race_without_a_budget_is_one_lap() -> None:
    track = Track([100, 900], sets=3)
    result = race(range(2), track.lap, budget_s=0.0, rules=RaceRules(), order=random.Random(0), clock=track.clock)
    assert {contestant: len(samples) for contestant, samples in result.samples_us.items()} == {0: 3, 1: 3}


def test_nobody_drops_out_of_a_race_without_elimination() -> None:
    track = Track([100, 900], noise=0.3)
    rules = RaceRules(eliminate=False, max_samples=20)
    result = race(range(2), track.lap, budget_s=1e9, rules=rules, order=random.Random(0), clock=track.clock)
    assert result.finalists == {0, 1}


def test_a_race_that_decides_goes_on_until_medians_have_intervals() -> None:
    rules = RaceRules(tight=1e-9, least_samples=6, overtime=9.0)
    track = Track([1000, 1000])
    result = race(range(2), track.lap, budget_s=3e-3, rules=rules, order=random.Random(0), clock=track.clock)
    assert [len(samples) for samples in result.samples_us.values()] == [6, 6]
    cut = Track([1000, 1000])
    race(range(2), cut.lap, budget_s=2e-3, rules=RaceRules(tight=1e-9), order=random.Random(0), clock=cut.clock)
    assert cut.laps < 3


def test_a_race_goes_on_within_its_limits() -> None:
    track = Track([1000, 1000])
    rules = RaceRules(least_samples=6, overtime=1.0)
    race(range(2), track.lap, budget_s=4e-3, rules=rules, order=random.Random(0), clock=track.clock)
    assert 3 < track.laps < 6


def test_nobody_drops_out_of_a_race_that_decides_with_too_few_samples_for_an_interval() -> None:
    track = Track([100, 900])
    rules = RaceRules(least_samples=6)
    result = race(range(2), track.lap, budget_s=1.0, rules=rules, order=random.Random(0), clock=track.clock)
    assert result.finalists == {0}
    assert len(result.samples_us[1]) == 6


@given(contestants=st.integers(1, 20), sets=st.integers(1, 16), laps=st.integers(1, 4))
def test_every_contestant_runs_on_every_set_once_a_lap(contestants: int, sets: int, laps: int) -> None:
    rotation = Rotation(sets)
    for _ in range(laps):
        calls = rotation.lap(list(range(contestants)))
        assert Counter(calls) == Counter((c, s) for c in range(contestants) for s in range(sets))


@given(contestants=st.integers(1, 20), sets=st.integers(2, 16))
def test_a_set_comes_back_only_after_most_others(contestants: int, sets: int) -> None:
    calls = [call for rotation in [Rotation(sets)] for _ in range(2) for call in rotation.lap(list(range(contestants)))]
    last_seen: dict[int, int] = {}
    for moment, (_, index) in enumerate(calls):
        if index in last_seen:
            # Between rounds a few sets are left out to keep contestants off the set that they had last.
            assert moment - last_seen[index] >= sets // 2
        last_seen[index] = moment


@pytest.mark.parametrize(
    ("weight_mb", "touched_mb", "copies", "sets"),
    [
        (470, 117, 1, 1),
        (470, 10, 1, 7),
        (64, 64, 1, 1),
        (20, 20, 4, 4),
        (20, 5, 4, 13),
        (0, 0, 16, 16),
        (0, 2000, 16, 1),
    ],
)
def test_a_rotation_exceeds_twice_the_cache(weight_mb: int, touched_mb: int, copies: int, sets: int) -> None:
    cache = 32 << 20
    assert weight_copies(weight_mb << 20, cache) == copies
    assert input_sets(touched_mb << 20, cache) == sets
