"""From measured times to a plan: layout, winner, switch points. Times are made up; nothing is built."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.archs import ARCHS
from tilewright.codegen.building.cpp import Compiler, CppBuilder
from tilewright.codegen.ops import find_op
from tilewright.codegen.ops.base import Problem
from tilewright.codegen.ops.moe_gemm_signature import MoeGemmSignature
from tilewright.codegen.routing import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.loop import Candidate, ProblemResult
from tilewright.tuner.plan import Final, Finalist, Layout, Raced, choose_layout, distil, settle_layout, sizes_between
from tilewright.tuner.variants import BuildResult, Workshop
from tilewright.tuning_db.records import Outcome, PlanRecord

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
DEFAULT = OP.default_config(SIGNATURE, ARCH)
WIDE, NARROW = "panel16_fp32", "panel8_fp32"
ROUNDS = 20

by_layout: dict[str, list[Config]] = {WIDE: [DEFAULT], NARROW: []}
for each in OP.space(SIGNATURE, ARCH)[:4000]:
    by_layout[OP.layout_key(SIGNATURE, each, ARCH)].append(each)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    nowhere = tmp_path_factory.mktemp("builds")
    return Workshop(OP, SIGNATURE, ARCH, CppBuilder(ARCH, Compiler("no-compiler", "none"), nowhere))


def problem(rows: int) -> Problem:
    return OP.problem(SIGNATURE, rows, RoutingSpec.parse("balanced"))


def result(workshop: Workshop, times: Mapping[Config, float], rows: int = 16) -> ProblemResult:
    made = ProblemResult(problem(rows), DEFAULT)
    for config, time_us in times.items():
        variant = workshop.variant(config)
        kernel = BuiltKernel(variant.key, Path("never-loaded"), variant.recipe)
        made.candidates[config] = Candidate(config, kernel, time_us)
    return made


def finalist(workshop: Workshop, config: Config, time_us: float) -> Finalist:
    variant = workshop.variant(config)
    samples = tuple(time_us * (1 + 0.001 * (index % 3)) for index in range(ROUNDS))
    evaluation = Evaluation(variant.key, Outcome.OK, samples_us=samples, median_us=time_us)
    return Finalist(BuildResult(variant, None, "", 0.0), evaluation)


def raced(workshop: Workshop, times: Mapping[Config, float], rows: int = 16) -> Raced:
    right = tuple(finalist(workshop, config, time_us) for config, time_us in times.items())
    return Raced(problem(rows), right, next(each for each in right if each.built.variant.config == DEFAULT))


def test_the_layout_to_search_in_loses_least_over_all_sizes(workshop: Workshop) -> None:
    wide, narrow = by_layout[WIDE][1], by_layout[NARROW][0]
    few = result(workshop, {DEFAULT: 100, wide: 90, narrow: 50})
    many = result(workshop, {DEFAULT: 100, wide: 80, narrow: 95})
    assert choose_layout([few, many]) == NARROW
    assert choose_layout([many]) == WIDE
    assert choose_layout([ProblemResult(problem(1), DEFAULT)]) is None


def test_no_size_is_searched_on_in_a_layout_slower_than_its_default(workshop: Workshop) -> None:
    narrow = by_layout[NARROW][0]
    few = result(workshop, {DEFAULT: 100, narrow: 40})
    many = result(workshop, {DEFAULT: 100, narrow: 110})
    assert choose_layout([few, many]) == WIDE


def test_the_last_race_settles_the_layout(workshop: Workshop) -> None:
    narrow = by_layout[NARROW][0]
    faster, slower = raced(workshop, {DEFAULT: 100, narrow: 40}), raced(workshop, {DEFAULT: 100, narrow: 110}, 256)
    assert settle_layout([faster]) == Layout(NARROW, 1.0)
    assert settle_layout([faster, slower]).key == WIDE
    assert settle_layout([faster, slower]).cost == pytest.approx((100 / 40) ** 0.5)


def test_a_size_that_only_another_layout_solves_is_not_lost(workshop: Workshop) -> None:
    narrow = by_layout[NARROW][0]
    both, wide_only = raced(workshop, {DEFAULT: 100, narrow: 40}), raced(workshop, {DEFAULT: 100}, 256)
    assert settle_layout([both, wide_only]).key == WIDE


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=8, unique=True).map(sorted))
def test_sizes_between_lie_between(sizes: Sequence[int]) -> None:
    between = sizes_between(sizes)
    assert not set(between) & set(sizes)
    assert all(sizes[0] < size < sizes[-1] for size in between)
    assert len(between) <= len(sizes) - 1


def final(workshop: Workshop, rows: int, config: Config) -> Final:
    winner, default = finalist(workshop, config, rows * 1.0), finalist(workshop, DEFAULT, rows * 2.0)
    even = Ratio(1.0, 0.99, 1.01, ROUNDS)
    return Final(problem(rows), winner.built, winner.evaluation, default.built, default.evaluation, even, even)


def plan(finals: Sequence[Final], between: Sequence[Final]) -> PlanRecord:
    return distil(finals, between, Layout(WIDE, 1.0), op="moe_gemm", device_key="cpu", threads=2, model="")


def entries(made: PlanRecord) -> list[tuple[int | None, int | None]]:
    return [(entry.max_tokens, entry.tuned_tokens) for entry in made.entries]


def test_kernels_switch_at_the_geometric_mean(workshop: Workshop) -> None:
    one, two = by_layout[WIDE][1:3]
    made = plan([final(workshop, 64, two), final(workshop, 4, one)], [])
    assert entries(made) == [(16, 4), (None, 64)]
    assert [entry.kernel_key for entry in made.entries] == [workshop.variant(c).key for c in (one, two)]
    assert made.entries[0].median_us == 4.0
    assert made.entries[0].default_us == 8.0


def test_a_race_between_moves_the_switch_to_where_the_better_kernel_begins(workshop: Workshop) -> None:
    one, two, three = by_layout[WIDE][1:4]
    finals = [final(workshop, 4, one), final(workshop, 64, two)]
    assert entries(plan(finals, [final(workshop, 16, one)])) == [(32, 4), (None, 64)]
    assert entries(plan(finals, [final(workshop, 16, two)])) == [(8, 4), (None, 64)]
    assert entries(plan(finals, [final(workshop, 16, three)])) == [(8, 4), (32, 16), (None, 64)]


def test_a_kernel_that_wins_everywhere_keeps_the_evidence_of_every_tuned_size(workshop: Workshop) -> None:
    one = by_layout[WIDE][1]
    made = plan([final(workshop, 4, one), final(workshop, 64, one)], [final(workshop, 16, one)])
    assert entries(made) == [(32, 4), (None, 64)]
