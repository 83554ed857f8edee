"""The last races with made-up times: a kernel that is slow between the tuned sizes is found by probes, and replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.loop import Candidate, ProblemResult, ProblemTuner
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint, VariantBuilder
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.plan.finals import Finals, Probed, Verdict
from tilewright.tuning_db.records import Outcome

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
DEFAULT = OP.default_config(SIGNATURE, ARCH)
TUNED = (1, 8, 64)
LAYOUT = OP.layout_key(SIGNATURE, DEFAULT, ARCH)
SPACE = OP.space(SIGNATURE, ARCH)[:4000]
SAME_LAYOUT = next(c for c in SPACE if OP.layout_key(SIGNATURE, c, ARCH) == LAYOUT and c != DEFAULT)
OTHER_LAYOUT = next(c for c in SPACE if OP.layout_key(SIGNATURE, c, ARCH) != LAYOUT)
HIT = (0, 1, 3)
"""Seeds of which a first round of four probes draws a size from 9 to 20."""
Times = Callable[[Config, int], float]


class MadeUpTimes:
    """A problem's tuner whose kernels take the times that a function gives."""

    def __init__(
        self, problem: Problem, variant_builder: VariantBuilder, time_us: Times, configs: Sequence[Config]
    ) -> None:
        self._variant_builder = variant_builder
        self._time_us = time_us
        self.result = ProblemResult(problem, DEFAULT)
        for config in configs:
            variant = variant_builder.variant(config)
            kernel = BuiltKernel(variant.key, Path("never-loaded"), variant.recipe)
            taken = time_us(config, problem.size)
            self.result.candidates[config] = Candidate(config, kernel, taken, variant.constraint)

    def race_again(self, configs: Sequence[Config], _budget_s: float) -> list[tuple[BuildResult, Evaluation]]:
        raced = []
        for config in configs:
            variant = self._variant_builder.variant(config)
            taken = self._time_us(config, self.result.problem.size)
            samples = tuple(taken * (1 + 0.001 * (index % 3)) for index in range(20))
            evaluation = Evaluation(variant.key, Outcome.OK, samples_us=samples, median_us=taken)
            raced.append((BuildResult(variant, Path("never-loaded"), "", 0.0), evaluation))
        return raced


class Quiet:
    """An evaluator that is asked for nothing but the noise."""

    def measure_noise(self, _kernel: BuiltKernel, _problem: Problem, *, budget_s: float) -> Ratio:
        return Ratio(1.0, 1.0 - 0.001 * budget_s, 1.001, 20)


@pytest.fixture
def variant_builder(tmp_path: Path) -> VariantBuilder:
    return VariantBuilder(OP, SIGNATURE, ARCH, {"cpp": CppBuilder(ARCH, Compiler("no-compiler", "none"), tmp_path)})


def run(variant_builder: VariantBuilder, time_us: Times, config: Config, seed: int) -> tuple[Verdict, Probed]:
    """Last races of ``config`` and the default, and probes."""

    def make_tuner(problem: Problem) -> ProblemTuner:
        return cast("ProblemTuner", MadeUpTimes(problem, variant_builder, time_us, [DEFAULT, config]))

    tuners = [make_tuner(OP.problem(SIGNATURE, size, RoutingSpec.parse("balanced"))) for size in TUNED]
    finals = Finals(make_tuner, cast("CpuEvaluator", Quiet()), Progress(None), copies=1, until=math.inf)
    variant = variant_builder.variant(config)
    verdict = finals.run(
        tuners, [constraint for constraint in (variant.constraint, PlanConstraint(LAYOUT)) if constraint]
    )
    assert verdict is not None
    return finals.probe(verdict, 4, seed)


def served(verdict: Verdict, size: int) -> str | None:
    return next(e.kernel_key for e in verdict.entries if e.max_size is None or size <= e.max_size)


def fast_but_for(config: Config, first: int, last: int) -> Times:
    """``config`` takes half of the default's time, but twice of it from ``first`` to ``last``."""

    def time_us(asked: Config, size: int) -> float:
        return 100.0 if asked != config else 200.0 if first <= size <= last else 50.0

    return time_us


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_that_no_probe_finds_slower_stays(variant_builder: VariantBuilder, seed: int) -> None:
    verdict, probed = run(variant_builder, fast_but_for(SAME_LAYOUT, 1, 0), SAME_LAYOUT, seed)
    assert [len(each) for each in probed.rounds] == [4]
    assert probed.mended_sizes == []
    assert {entry.kernel_key for entry in verdict.entries} == {variant_builder.variant(SAME_LAYOUT).key}


@pytest.mark.parametrize("seed", range(6))
def test_the_default_serves_where_a_probe_finds_the_plan_slower(variant_builder: VariantBuilder, seed: int) -> None:
    verdict, probed = run(variant_builder, fast_but_for(SAME_LAYOUT, 9, 20), SAME_LAYOUT, seed)
    drawn = [probe.problem.size for each in probed.rounds[:-1] for probe in each]
    assert probed.mended_sizes == [size for size in drawn if 9 <= size <= 20]
    assert bool(probed.mended_sizes) is (seed in HIT)
    for size in probed.mended_sizes:
        assert served(verdict, size) == variant_builder.variant(DEFAULT).key
    assert {served(verdict, size) for size in TUNED} == {variant_builder.variant(SAME_LAYOUT).key}
    assert verdict.settled.layout == LAYOUT


def test_a_constraint_that_few_sizes_searched_has_a_kernel_for_all(variant_builder: VariantBuilder) -> None:
    """A precision whose layout the search tried at one size alone still gets its plan."""

    def make_tuner(problem: Problem) -> ProblemTuner:
        tried = [DEFAULT, OTHER_LAYOUT] if problem.size == TUNED[0] else [DEFAULT, SAME_LAYOUT]
        return cast("ProblemTuner", MadeUpTimes(problem, variant_builder, fast_but_for(SAME_LAYOUT, 1, 0), tried))

    tuners = [make_tuner(OP.problem(SIGNATURE, size, RoutingSpec.parse("balanced"))) for size in TUNED]
    finals = Finals(make_tuner, cast("CpuEvaluator", Quiet()), Progress(None), copies=1, until=math.inf)
    other = variant_builder.variant(OTHER_LAYOUT).constraint
    assert other is not None
    verdict = finals.run(tuners, [PlanConstraint(LAYOUT), other])
    assert verdict is not None
    assert verdict.settled.layout == LAYOUT
    within = finals.within([other])
    assert within is not None
    assert [final.problem.size for final in within.finals] == list(TUNED)
    assert {entry.kernel_key for entry in within.entries} == {variant_builder.variant(OTHER_LAYOUT).key}


def test_a_layout_in_which_nothing_is_as_fast_as_the_default_gives_way_to_the_default_s(
    variant_builder: VariantBuilder,
) -> None:
    found = []
    for seed in range(6):
        verdict, probed = run(variant_builder, fast_but_for(OTHER_LAYOUT, 9, 20), OTHER_LAYOUT, seed)
        found.append(probed.mended_sizes)
        layout = LAYOUT if probed.mended_sizes else OP.layout_key(SIGNATURE, OTHER_LAYOUT, ARCH)
        assert verdict.settled.layout == layout
        slow = [probe for probe in probed.last if probe.slower]
        assert not slow or len(probed.rounds) == 3
    assert any(found)


@pytest.mark.parametrize("copies", [1, 2])
def test_beside_a_plan_of_another_layout_stands_one_that_the_default_can_join(
    variant_builder: VariantBuilder, copies: int
) -> None:
    def time_us(config: Config, _size: int) -> float:
        return {DEFAULT: 100.0, SAME_LAYOUT: 90.0, OTHER_LAYOUT: 50.0}[config]

    def make_tuner(problem: Problem) -> ProblemTuner:
        return cast(
            "ProblemTuner", MadeUpTimes(problem, variant_builder, time_us, [DEFAULT, SAME_LAYOUT, OTHER_LAYOUT])
        )

    tuners = [make_tuner(OP.problem(SIGNATURE, size, RoutingSpec.parse("balanced"))) for size in TUNED]
    finals = Finals(make_tuner, cast("CpuEvaluator", Quiet()), Progress(None), copies=copies, until=math.inf)
    other, default = (variant_builder.variant(config).constraint for config in (OTHER_LAYOUT, DEFAULT))
    assert other
    assert default
    verdict = finals.run(tuners, [other, default])
    assert verdict is not None
    assert verdict.settled.constraints == (other,)
    assert finals.alternative(verdict, other) is None
    assert finals.alternative(verdict, None) is None
    beside = finals.alternative(verdict, default)
    assert beside is not None
    assert beside.settled.constraints == (default, other)[:copies]
    assert beside.candidates == 1
    serves = variant_builder.variant((SAME_LAYOUT, OTHER_LAYOUT)[copies - 1]).key
    assert {entry.kernel_key for entry in beside.entries} == {serves}
