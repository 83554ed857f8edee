"""The one rule by which a kernel replaces another, in simulated races; seeded."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tilewright.tuner.evaluation.statistics import paired_ratio
from tilewright.tuner.plan.decide import Pairing, preferred, replaces, replaces_overall

LAPS = 30
Times = NDArray[np.float64]


class Machine:
    """Kernels of known speed on a machine with noise on every call, a clock that drifts, and now and then a stall."""

    def __init__(self, noise: float, seed: int) -> None:
        self._noise = noise
        self._random = np.random.default_rng(seed)

    def race(self, *true_us: float, laps: int = LAPS) -> list[Times]:
        """Times in us of kernels that take so long in truth, [laps] each."""
        drift = np.exp(np.cumsum(self._random.normal(0, 0.01, laps)))
        return [self._times(each, drift) for each in true_us]

    def aa_noise(self) -> float:
        """What a kernel raced with itself says."""
        return paired_ratio(*self.race(100.0, 100.0)).noise or 0.0

    def _times(self, true_us: float, drift: Times) -> Times:
        stalls = np.where(self._random.random(len(drift)) < 0.03, 3.0, 1.0)
        times: Times = true_us * drift * stalls * self._random.lognormal(0, self._noise, len(drift))
        return times


def share_replaced(machine: Machine, candidate_us: float, pairs: int, laps: int = LAPS) -> float:
    """Of so many races of a candidate against a default of 100 us, those in which it takes the default's place."""
    replaced = 0
    for _ in range(pairs):
        candidate, default = machine.race(candidate_us, 100.0, laps=laps)
        replaced += replaces(candidate, default, noise=machine.aa_noise())
    return replaced / pairs


@pytest.mark.parametrize("laps", [3, 6, LAPS])
@pytest.mark.parametrize("noise", [0.01, 0.02, 0.03, 0.05, 0.08])
def test_of_equal_kernels_the_default_is_replaced_in_one_of_twenty_races_at_most(noise: float, laps: int) -> None:
    assert share_replaced(Machine(noise, seed=1), 100.0, pairs=400, laps=laps) <= 0.05


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.03])
def test_a_kernel_that_is_faster_by_more_than_the_noise_replaces_the_default(noise: float) -> None:
    assert share_replaced(Machine(noise, seed=2), 90.0, pairs=200) >= 0.9


@pytest.mark.parametrize("candidate_us", [110.0, 101.0])
def test_a_slower_kernel_replaces_nothing(candidate_us: float) -> None:
    assert share_replaced(Machine(0.02, seed=3), candidate_us, pairs=200) == 0.0


def test_a_kernel_replaces_nothing_by_less_than_races_resolve() -> None:
    """However sure it is."""
    default = np.linspace(99, 101, 400)
    assert not replaces(0.985 * default, default)
    assert replaces(0.975 * default, default)


def test_a_winner_within_the_noise_replaces_nothing() -> None:
    default = np.linspace(99, 101, 50)
    assert replaces(0.95 * default, default, noise=0.04)
    assert not replaces(0.95 * default, default, noise=0.06)


def test_a_winner_whose_interval_reaches_one_replaces_nothing() -> None:
    default = np.full(20, 100.0)
    unsure = np.array([80.0] * 12 + [120.0] * 8)
    assert np.median(unsure / default) == 0.8
    assert not replaces(unsure, default)


@pytest.mark.parametrize(("gain", "expected"), [(0.049, False), (0.051, True)])
def test_a_prediction_replaces_another_by_more_than_the_model_is_off(gain: float, expected: bool) -> None:
    """Its samples are the same every time, so that the margin alone decides."""
    assert replaces(np.full(6, 100 * (1 - gain)), np.full(6, 100.0), noise=0.05) is expected


@pytest.mark.parametrize(
    ("pairs", "factor", "expected"), [(1, 0.3, True), (1, 0.5, False), (4, 0.87, True), (4, 0.9, False)]
)
def test_few_pairs_must_agree_by_a_wide_gap(pairs: int, factor: float, expected: bool) -> None:
    default = np.full(pairs, 100.0)
    assert replaces(factor * default, default) is expected
    if pairs > 1:
        assert not replaces(np.array([*(factor * default[1:]), 100.0]), default)


def test_who_asks_often_is_still_right_nineteen_times_in_twenty() -> None:
    """Sixty equal kernels and one default: some lead by luck, and the more there are the further."""
    machine, kernels, campaigns = Machine(0.05, seed=4), 60, 60
    fooled = {"at once": 0, "one by one": 0}
    for _ in range(campaigns):
        default, *candidates = machine.race(*[100.0] * (kernels + 1))
        fooled["at once"] += any(replaces(each, default, comparisons=kernels) for each in candidates)
        fooled["one by one"] += any(replaces(each, default) for each in candidates)
    assert fooled["at once"] <= 0.05 * campaigns
    assert fooled["one by one"] > 0.2 * campaigns


def test_races_at_several_sizes_together_say_more_than_each() -> None:
    machine = Machine(0.05, seed=5)
    races = [Pairing(*machine.race(95.0, 100.0, laps=20)) for _ in range(12)]
    alone = [replaces(each.candidate_us, each.incumbent_us) for each in races]
    assert sum(alone) < 8
    assert replaces_overall(races)
    assert not replaces_overall([Pairing(each.incumbent_us, each.candidate_us) for each in races])


def test_a_gain_at_one_size_of_many_is_no_gain_overall() -> None:
    default = np.linspace(99, 101, 20)
    races = [Pairing(default * factor, default) for factor in (0.9, *[1.0] * 11)]
    assert not replaces_overall(races)
    assert replaces_overall(races[:1])


def test_noise_at_every_size_counts() -> None:
    default = np.linspace(99, 101, 20)
    assert not replaces_overall([Pairing(0.95 * default, default, noise=0.2) for _ in range(4)])
    assert replaces_overall([Pairing(0.95 * default, default, noise=0.06) for _ in range(4)])


def test_kernels_that_never_met_change_nothing() -> None:
    assert not replaces_overall([])


def test_who_stands_first_stays_unless_replaced() -> None:
    assert preferred([3, 2, 1], lambda _candidate, _incumbent: False) == 3
    assert preferred([3, 2, 1], lambda candidate, incumbent: candidate < incumbent) == 1
    assert preferred([100, 99, 98, 50, 49], lambda candidate, incumbent: candidate < 0.9 * incumbent) == 50
