"""Which trial speaks for which kernel."""

from dataclasses import replace

from tuning_db_samples import trial

from tilewright.tuner.campaign.loop import FINAL_RACE
from tilewright.tuner.campaign.standings import measured_document, standings


def timed(kernel, median_us, search="gp", run="run"):
    return replace(trial(run), kernel_key=kernel, median_us=median_us, search=search)


def names(trials):
    return [(t.kernel_key, t.median_us) for t in standings(trials)]


def test_without_a_last_race_the_fastest_trial_of_each_kernel_counts():
    assert names([timed("a", 5.0), timed("b", 4.0), timed("a", 3.0)]) == [("a", 3.0), ("b", 4.0)]


def test_finalists_come_first_by_their_last_race():
    trials = [
        timed("lucky", 1.0),
        timed("a", 2.0),
        timed("b", 3.0),
        timed("a", 6.0, FINAL_RACE),
        timed("b", 5.0, FINAL_RACE),
    ]
    assert names(trials) == [("b", 5.0), ("a", 6.0), ("lucky", 1.0)]


def test_only_the_last_race_of_the_last_run_counts():
    trials = [timed("a", 2.0, FINAL_RACE, "old"), timed("b", 9.0, FINAL_RACE, "new"), timed("a", 4.0, run="new")]
    assert names(trials) == [("b", 9.0), ("a", 2.0)]


def test_nothing_stands_where_nothing_was_right():
    assert standings([]) == []


def test_a_measured_entry_has_samples_interval_and_error():
    timed = replace(trial("run"), low_us=1.0, high_us=2.0, median_us=1.5, error=1e-6)
    six, two = replace(timed, samples_us=(1.0, 2.0) * 3), replace(timed, samples_us=(1.0, 2.0))
    assert measured_document(six) == {"median_us": 1.5, "low_us": 1.0, "high_us": 2.0, "samples": 6, "error": 1e-6}
    # Databases hold such intervals from when their range was taken for one.
    assert measured_document(two) == {"median_us": 1.5, "low_us": None, "high_us": None, "samples": 2, "error": 1e-6}
    predicted = replace(timed, samples_us=(), timing="predicted")
    assert measured_document(predicted)["low_us"] == 1.0
