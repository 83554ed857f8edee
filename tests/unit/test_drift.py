"""Times of batches that were raced at different moments are made comparable by what both raced."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.loop import BATCH, Budget, Origin, ProblemResult, ProblemTuner
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.variants import BuildResult, VariantBuilder
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuning_db.records import DeviceRecord, Outcome
from tilewright.tuning_db.store import Store

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
PROBLEM = OP.problem(SIGNATURE, 8, RoutingSpec.parse("balanced"))
DEFAULT = OP.default_for(PROBLEM, ARCH)
PACE = (1.0, 2.0, 0.5, 4.0)
"""By which this machine is slower in one batch after the other."""
Times = Callable[[Config], float]


class Unbuilt(VariantBuilder):
    """Renders, but compiles nothing."""

    def build(self, configs: Sequence[Config], progress: object = None) -> list[BuildResult]:
        del progress
        return [BuildResult(self.variant(config), Path("never-loaded"), "", 0.0) for config in configs]


class DriftingMachine:
    """An evaluator on a machine whose pace is another one in every batch; it notes what it raced."""

    def __init__(self, true_us: Times, pace: Sequence[float]) -> None:
        self._true_us = true_us
        self._pace = pace
        self.raced: list[list[Config]] = []

    def evaluate(self, kernels: Sequence[BuiltKernel], *_: Any, **__: Any) -> list[Evaluation]:
        pace = self._pace[len(self.raced)]
        self.raced.append([kernel.config for kernel in kernels])
        times = [pace * self._true_us(kernel.config) for kernel in kernels]
        return [
            Evaluation(kernel.key, Outcome.OK, samples_us=(time_us,) * 8, median_us=time_us)
            for kernel, time_us in zip(kernels, times, strict=True)
        ]


def searched(folder: Path, true_us: Times, pace: Sequence[float] = PACE) -> tuple[ProblemResult, DriftingMachine]:
    """What a search of as many batches as there are paces finds."""
    machine = DriftingMachine(true_us, pace)
    with Store.open(folder / "t.db") as store:
        store.put_device(DeviceRecord("a-cpu", "a CPU", ARCH.name, {}))
        run = store.start_run("tune", versions={}, host="here").id
        tuner = ProblemTuner(
            PROBLEM,
            variant_builder=Unbuilt(
                OP, SIGNATURE, ARCH, {"cpp": CppBuilder(ARCH, Compiler("no-compiler", "none"), folder)}
            ),
            evaluator=cast("Evaluator", machine),
            store=store,
            origin=Origin(run_id=run, device_key="a-cpu", threads=2, seed=5, search="random"),
            progress=Progress(None),
        )
        tuner.search(OP.space(SIGNATURE, ARCH), Budget(BATCH * len(pace), time.monotonic() + 600), [])
    return tuner.result, machine


def true_us(config: Config) -> float:
    """The default takes 100 us, every other one between 60 and 160."""
    return 100.0 if config == DEFAULT else 60.0 + hash(config) % 1000 / 10


def test_the_search_is_told_times_as_of_the_first_batch(tmp_path: Path) -> None:
    result, machine = searched(tmp_path, true_us)
    assert len(machine.raced) == len(PACE)
    assert len(result.told) == BATCH * len(PACE)
    for trial in result.told:
        assert trial.time_us == pytest.approx(true_us(trial.config))
    for config, candidate in result.candidates.items():
        assert candidate.time_us == pytest.approx(true_us(config))


def test_every_batch_races_the_default_again(tmp_path: Path) -> None:
    _, machine = searched(tmp_path, true_us)
    assert all(DEFAULT in raced for raced in machine.raced)


def test_where_the_default_is_very_slow_the_best_of_the_first_batch_is_raced_again(tmp_path: Path) -> None:
    def slow_default(config: Config) -> float:
        return 500.0 if config == DEFAULT else true_us(config)

    result, machine = searched(tmp_path, slow_default)
    anchor = min(machine.raced[0], key=slow_default)
    for raced in machine.raced[1:]:
        assert anchor in raced
        assert DEFAULT not in raced
    for trial in result.told:
        assert trial.time_us == pytest.approx(slow_default(trial.config))


def test_who_led_by_luck_falls_back(tmp_path: Path) -> None:
    """The best so far is raced with every batch, and what counts is the mean of its races."""
    lucky: dict[Config, int] = {}

    def sometimes_lucky(config: Config) -> float:
        if config == DEFAULT:
            return 100.0
        lucky.setdefault(config, 0)
        lucky[config] += 1
        first = next(iter(lucky))
        return 60.0 if (config, lucky[config]) == (first, 1) else 90.0

    result, _ = searched(tmp_path, sometimes_lucky, pace=(1.0, 1.0))
    first = next(iter(lucky))
    assert lucky[first] == 2
    assert result.candidates[first].time_us == pytest.approx((60.0 * 90.0) ** 0.5)
    assert result.candidates[first].races == 2
