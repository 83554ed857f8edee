import gc
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
interleave = importlib.import_module("interleave")

pytest_plugins = ["pytester"]


def waits(seconds):
    return lambda: time.sleep(seconds)


def quick_race(contenders, **options):
    options = {"budget_s": 0.0, "min_rounds": 6, "lead_in_us": 0.0} | options
    return interleave.race(contenders, control=next(iter(contenders)), **options)


def test_every_contender_has_one_sample_per_round():
    race = quick_race({"a": [lambda: None], "b": [lambda: None]}, min_rounds=7)
    assert {name: len(result.samples_us) for name, result in race.results.items()} == {"a": 7, "b": 7, "a (again)": 7}


def test_measures_wall_time_and_pairs_ratios_by_round():
    race = quick_race({"fast": [waits(0.001)], "slow": [waits(0.004)]})
    fast, slow = race.results["fast"].samples_us, race.results["slow"].samples_us
    assert min(fast) >= 1000
    assert min(slow) >= 4000
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    assert race.ratio("slow", "fast").median == statistics.median(ratios)
    assert race.ratio("slow", "slow") == interleave.Estimate(1.0, 1.0, 1.0)
    assert race.fastest(["slow", "fast"]) == "fast"


def test_noise_is_the_control_against_its_second_entry():
    race = quick_race({"a": [waits(0.001)], "b": [waits(0.002)]})
    first, second = race.results["a"].samples_us, race.results["a (again)"].samples_us
    assert first != second
    assert race.noise.median == statistics.median([s / f for f, s in zip(first, second, strict=True)])
    assert "a against itself, 6 rounds" in race.table("a")


def test_consecutive_calls_take_consecutive_buffers_even_across_contenders():
    touched = []
    rotations = [lambda i=i: touched.append(i) for i in range(5)]
    quick_race({"a": rotations, "b": rotations})
    warm_up, raced = touched[:15], touched[15:]
    assert sorted(warm_up) == sorted([*range(5)] * 3)
    assert raced == [i % 5 for i in range(len(raced))]
    assert len(raced) == 6 * 3 * 2  # rounds x entrants x (one call to lead in, one timed)


def test_order_changes_between_rounds():
    called = []
    contenders = {name: [lambda name=name: called.append(name)] for name in "abcd"}
    quick_race(contenders, min_rounds=8)
    timed = called[6::2]  # after the warm-up, every other call is timed
    rounds = {tuple(timed[i : i + 5]) for i in range(0, len(timed), 5)}
    assert len(rounds) > 4


def test_leads_in_for_at_least_the_given_time():
    calls = []
    quick_race({"a": [lambda: calls.append(time.sleep(0.0005))]}, min_rounds=1, lead_in_us=3000.0)
    # Warm-up of two entrants, then for each about 6 calls to lead in (a slow machine makes fewer) and a timed one.
    assert 2 + 2 * (1 + 1) <= len(calls) <= 2 + 2 * (6 + 1)


def test_budget_stops_between_the_limits():
    slow = {"a": [waits(0.002)]}
    assert len(quick_race(slow, budget_s=0.1, max_rounds=10_000).results["a"].samples_us) < 50
    assert len(quick_race(slow, budget_s=60.0, max_rounds=9).results["a"].samples_us) == 9


def test_unequal_rotations_and_unknown_control_are_refused():
    with pytest.raises(ValueError, match="same number of rotations"):
        quick_race({"a": [lambda: None], "b": [lambda: None] * 2})
    with pytest.raises(ValueError, match="'c' is not among the contenders: a"):
        interleave.race({"a": [lambda: None]}, control="c", budget_s=0.0)


def test_garbage_collection_is_restored_after_a_failing_contender():
    calls = []

    def fails_when_raced():
        calls.append(gc.isenabled())
        if len(calls) > 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        quick_race({"a": [fails_when_raced]})
    assert calls == [True, True, False]
    assert gc.isenabled()


@given(st.lists(st.floats(0.1, 1e9), min_size=1, max_size=60))
def test_interval_encloses_the_median_and_its_order_statistics_have_the_coverage(samples):
    estimate = interleave.median_with_interval(samples)
    assert estimate.low <= estimate.median <= estimate.high
    assert {estimate.low, estimate.high} <= set(samples)


@pytest.mark.parametrize("count", [6, 7, 10, 25, 100, 401])
def test_interval_is_the_narrowest_symmetric_one_of_95_percent(count):
    estimate = interleave.median_with_interval([float(i) for i in range(count)])
    below = int(estimate.low)
    assert estimate.high == count - 1 - below

    def coverage(
        rank,
    ):  # the chance that between rank + 1 and count - rank - 1 of the samples lie under the true median
        return binom.cdf(count - rank - 1, count, 0.5) - binom.cdf(rank, count, 0.5)

    assert coverage(below) >= 0.95
    assert coverage(below + 1) < 0.95


SESSION = """
    import pytest
    from interleave import Race, Result, record, recorded_time

    SAMPLES = {"a": (10.0, 12.5, 11.0), "b": (100.0, 300.0)}

    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.benchmark(timer=recorded_time, group="pair")
    def test_pair(benchmark, name):
        record(benchmark, Race({name: Result(name, SAMPLES[name])}, name), name)
"""


@pytest.fixture(autouse=True)
def outside_of_xdist(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under xdist pytest-benchmark measures nothing


# Finding out what the machine is takes pytest-benchmark seconds.
QUICK_MACHINE_INFO = "def pytest_benchmark_generate_machine_info(): return {'node': 'here'}"


def test_pytest_benchmark_stores_and_compares_the_recorded_samples(pytester):
    pytester.makeconftest(QUICK_MACHINE_INFO)
    pytester.makepyfile(SESSION)
    storage = f"--benchmark-storage=file://{pytester.path}/saved"
    saved = pytester.runpytest_inprocess(storage, "--benchmark-json=out.json", "--benchmark-save=first")
    saved.assert_outcomes(passed=2)
    entries = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    stats = {each["param"]: each["stats"] for each in entries}
    assert stats["a"]["data"] == pytest.approx([10e-6, 12.5e-6, 11e-6])
    assert stats["b"]["median"] == pytest.approx(200e-6)

    compared = pytester.runpytest_inprocess(storage, "--benchmark-compare", "--benchmark-compare-fail=median:1%")
    compared.assert_outcomes(passed=2)
    compared.stdout.fnmatch_lines("*0001_first*")


def test_the_tests_run_with_benchmarks_disabled(pytester):
    pytester.makepyfile(SESSION)
    pytester.runpytest_inprocess("--benchmark-disable").assert_outcomes(passed=2)


def test_a_test_without_the_recorded_timer_fails(pytester):
    pytester.makepyfile(SESSION.replace("timer=recorded_time, ", ""))
    session = pytester.runpytest_inprocess()
    session.assert_outcomes(failed=2)
    session.stdout.fnmatch_lines("*mark the test with timer=recorded_time*")
