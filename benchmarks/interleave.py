"""Race several contenders in one run, so that the drift of a shared machine falls on all of them alike.

In every round each contender is timed once, in shuffled order. Before its timed call a contender runs untimed for a
moment: its own threads are then awake, the spinning threads of the others have gone to sleep, and its code is in the
caches. Its data are not: every call takes the next of several buffers, which together exceed the last-level cache.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from pytest_benchmark.fixture import BenchmarkFixture
from scipy.stats import binom

Call = Callable[[], object]
# A contender: one call per rotation. The rotations do the same amount of work on different data.
Rotations = Sequence[Call]

AGAIN = " (again)"


@dataclass(frozen=True)
class Estimate:
    """A median with the interval that holds it with 95 % confidence; no distribution is assumed (order statistics)."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Result:
    """The wall-clock samples of one contender, in microseconds, in the order of the rounds."""

    name: str
    samples_us: tuple[float, ...]

    @property
    def min_us(self) -> float:
        return min(self.samples_us)

    @property
    def median_us(self) -> Estimate:
        return median_with_interval(self.samples_us)


@dataclass(frozen=True)
class Race:
    """What one run measured. ``control`` is the contender that entered twice, to show the noise of this machine."""

    results: Mapping[str, Result]
    control: str

    def ratio(self, name: str, against: str) -> Estimate:
        """How many times longer ``name`` takes than ``against``: the median of the ratios within each round."""
        pairs = zip(self.results[name].samples_us, self.results[against].samples_us, strict=True)
        return median_with_interval([mine / other for mine, other in pairs])

    def fastest(self, names: Sequence[str]) -> str:
        """The name of the contender with the least median among ``names``."""
        return min(names, key=lambda name: self.results[name].median_us.median)

    @property
    def noise(self) -> Estimate:
        """The control against itself. What differs from 1 by less than this does is not a difference."""
        return self.ratio(self.control + AGAIN, self.control)

    def table(self, against: str) -> str:
        """One line per contender, fastest first, with its time relative to ``against``, and a line with the noise."""
        width = max(map(len, self.results))
        ranked = sorted(self.results.values(), key=lambda result: result.median_us.median)
        lines = [
            f"{result.name:{width}}  {result.median_us:10.1f} us  min {result.min_us:10.1f} us"
            f"  x {self.ratio(result.name, against):.3f}"
            for result in ranked
        ]
        rounds = len(ranked[0].samples_us)
        return "\n".join([*lines, f"noise ({self.control} against itself, {rounds} rounds): {self.noise:.3f}"])


def race(
    contenders: Mapping[str, Rotations],
    *,
    control: str,
    budget_s: float,
    min_rounds: int = 10,
    max_rounds: int = 400,
    lead_in_us: float = 5000.0,
    seed: int = 0,
) -> Race:
    """Time every contender once per round until ``budget_s`` seconds have passed, within the limits on rounds.

    ``lead_in_us`` is how long a contender runs untimed before each timed call, at least one call. The default outlasts
    the spinning of libgomp's idle threads (about 4 ms), the longest of the thread pools met here.
    """
    if control not in contenders:
        raise ValueError(f"the control {control!r} is not among the contenders: {', '.join(contenders)}")
    if len({len(rotations) for rotations in contenders.values()}) != 1:
        raise ValueError("all contenders need the same number of rotations")
    entrants = {**contenders, control + AGAIN: contenders[control]}
    # One counter for all of them: no call finds its data in the cache because another contender has just read them.
    turn = count()
    samples_us: dict[str, list[float]] = {name: [] for name in entrants}
    order = list(entrants)
    shuffle = random.Random(seed).shuffle

    for name in order:  # warm-up: every buffer is touched once
        for call in entrants[name]:
            call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        ends_at = time.perf_counter() + budget_s
        rounds = 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < ends_at):
            shuffle(order)
            for name in order:
                samples_us[name].append(_time_us(entrants[name], turn, lead_in_us))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return Race({name: Result(name, tuple(samples)) for name, samples in samples_us.items()}, control)


def _time_us(rotations: Rotations, turn: "count[int]", lead_in_us: float) -> float:
    timed_from_ns = time.perf_counter_ns() + lead_in_us * 1e3
    while True:
        rotations[next(turn) % len(rotations)]()
        if time.perf_counter_ns() >= timed_from_ns:
            break
    call = rotations[next(turn) % len(rotations)]
    start_ns = time.perf_counter_ns()
    output = call()
    end_ns = time.perf_counter_ns()
    del output  # freed outside of the measured time
    return (end_ns - start_ns) * 1e-3


def median_with_interval(samples: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median and the order statistics that enclose it with at least ``confidence``.

    With fewer than 6 samples even the extremes do not reach 95 %; they are returned all the same.
    """
    ordered = sorted(samples)
    below = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    lowest = max(below - 1, 0)
    return Estimate(statistics.median(ordered), ordered[lowest], ordered[-1 - lowest])


class RecordedTime:
    """A timer for pytest-benchmark that shows durations which a race has already measured.

    pytest-benchmark reads its timer before and after each call. This one reads 0 before and the next recorded duration
    after, so that its statistics, JSON and comparisons hold the race's own samples.
    """

    def __init__(self) -> None:
        self._readings_s: list[float] = []

    def load(self, samples_us: Sequence[float]) -> None:
        self._readings_s = [reading for sample in reversed(samples_us) for reading in (sample * 1e-6, 0.0)]

    def __call__(self) -> float:
        return self._readings_s.pop()


recorded_time = RecordedTime()


def record(benchmark: BenchmarkFixture, race: Race, name: str) -> None:
    """Give pytest-benchmark the samples of ``name``. The test is marked ``benchmark(timer=recorded_time)``."""
    result = race.results[name]
    recorded_time.load(result.samples_us)
    benchmark.extra_info["median_us"] = str(result.median_us)
    benchmark.pedantic(lambda: None, rounds=len(result.samples_us), iterations=1)
    if benchmark.enabled and tuple(benchmark.stats.stats.data) != tuple(sample * 1e-6 for sample in result.samples_us):
        raise RuntimeError("pytest-benchmark did not use the recorded times: mark the test with timer=recorded_time")
