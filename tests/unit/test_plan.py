"""From measured times to a plan: layout, winner, switch points. Times are made up; nothing is built."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.loop import Candidate, ProblemResult
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint, VariantBuilder
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.plan.constraint import Finalist, Raced, choose_constraints, settle
from tilewright.tuner.plan.distil import Crossing, assign, cost_of, distil, probe_sizes, sizes_between
from tilewright.tuner.plan.entries import Substitute, plan_entries, substituted
from tilewright.tuning_db.records import Outcome, PlanEntry

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
DEFAULT = OP.default_config(SIGNATURE, ARCH)
WIDE, NARROW = "panel16_fp32", "panel8_fp32"
WIDE_ONES, NARROW_ONES = (PlanConstraint(WIDE),), (PlanConstraint(NARROW),)
ROUNDS = 20

by_layout: dict[str, list[Config]] = {WIDE: [DEFAULT], NARROW: []}
for each in OP.space(SIGNATURE, ARCH)[:4000]:
    by_layout[OP.layout_key(SIGNATURE, each, ARCH)].append(each)


@pytest.fixture(scope="module")
def variant_builder(tmp_path_factory: pytest.TempPathFactory) -> VariantBuilder:
    nowhere = tmp_path_factory.mktemp("builds")
    return VariantBuilder(OP, SIGNATURE, ARCH, {"cpp": CppBuilder(ARCH, Compiler("no-compiler", "none"), nowhere)})


def problem(rows: int) -> Problem:
    return OP.problem(SIGNATURE, rows, RoutingSpec.parse("balanced"))


def result(variant_builder: VariantBuilder, times: Mapping[Config, float], rows: int = 16) -> ProblemResult:
    made = ProblemResult(problem(rows), DEFAULT)
    for config, time_us in times.items():
        variant = variant_builder.variant(config)
        kernel = BuiltKernel(variant.key, Path("never-loaded"), variant.recipe)
        made.candidates[config] = Candidate(config, kernel, time_us, variant.constraint)
    return made


def finalist(variant_builder: VariantBuilder, config: Config, time_us: float) -> Finalist:
    variant = variant_builder.variant(config)
    samples = tuple(time_us * (1 + 0.001 * (index % 3)) for index in range(ROUNDS))
    evaluation = Evaluation(variant.key, Outcome.OK, samples_us=samples, median_us=time_us)
    return Finalist(BuildResult(variant, None, "", 0.0), evaluation, int(config != DEFAULT))


def raced(variant_builder: VariantBuilder, times: Mapping[Config, float], rows: int = 16) -> Raced:
    right = tuple(finalist(variant_builder, config, time_us) for config, time_us in times.items())
    return Raced(problem(rows), right, next(each for each in right if each.built.variant.config == DEFAULT))


def test_the_layout_to_search_in_loses_least_over_all_sizes(variant_builder: VariantBuilder) -> None:
    wide, narrow = by_layout[WIDE][1], by_layout[NARROW][0]
    few = result(variant_builder, {DEFAULT: 100, wide: 90, narrow: 50})
    many = result(variant_builder, {DEFAULT: 100, wide: 80, narrow: 95})
    assert choose_constraints([few, many]) == NARROW_ONES
    assert choose_constraints([many]) == WIDE_ONES
    assert choose_constraints([few, many], copies=2) == (*NARROW_ONES, *WIDE_ONES)
    assert choose_constraints([many], copies=2) == WIDE_ONES
    assert choose_constraints([ProblemResult(problem(1), DEFAULT)]) == ()


def test_no_size_is_searched_on_in_a_layout_slower_than_its_default(variant_builder: VariantBuilder) -> None:
    narrow = by_layout[NARROW][0]
    few = result(variant_builder, {DEFAULT: 100, narrow: 40})
    many = result(variant_builder, {DEFAULT: 100, narrow: 110})
    assert choose_constraints([few, many]) == WIDE_ONES


def test_the_last_race_settles_the_layout(variant_builder: VariantBuilder) -> None:
    narrow = by_layout[NARROW][0]
    faster, slower = (
        raced(variant_builder, {DEFAULT: 100, narrow: 40}),
        raced(variant_builder, {DEFAULT: 100, narrow: 110}, 256),
    )
    assert (settle([faster]).constraints, settle([faster]).cost) == (NARROW_ONES, 1.0)
    assert settle([faster, slower]).constraints == WIDE_ONES
    assert settle([faster, slower]).cost == pytest.approx((100 / 40) ** 0.5)
    assert settle([faster, slower], copies=2).cost == pytest.approx(1.0)
    assert settle([faster, slower], copies=2).another is None
    another = settle([faster, slower]).another
    assert another is not None
    assert (another.layout, another.cost) == (f"{WIDE}+{NARROW}", pytest.approx(1.0))
    assert settle([faster]).another is None


def test_a_size_that_only_another_layout_solves_is_not_lost(variant_builder: VariantBuilder) -> None:
    narrow = by_layout[NARROW][0]
    both, wide_only = raced(variant_builder, {DEFAULT: 100, narrow: 40}), raced(variant_builder, {DEFAULT: 100}, 256)
    assert settle([both, wide_only]).constraints == WIDE_ONES


def test_an_order_of_sums_is_shared_and_its_cost_told(tmp_path: Path) -> None:
    signature = MoeGemmSignature(stage="down", experts=4, n=64, k=64, top_k=2)
    shop = VariantBuilder(
        OP, signature, ARCH, {"cpp": CppBuilder(ARCH, Compiler("no-compiler", "none"), tmp_path)}, batch_invariant=True
    )
    default = OP.default_config(signature, ARCH)
    direct = Config({**default, "combine": "direct"})
    one, two = finalist(shop, default, 100), finalist(shop, direct, 50)
    assert one.constraint
    assert two.constraint
    assert one.constraint.layout == two.constraint.layout
    assert one.constraint != two.constraint
    only_default = Raced(problem(1), (one,), one)
    settled = settle([Raced(problem(8), (one, two), one), only_default])
    assert settled.constraints == (one.constraint,)
    assert settled.order_cost == pytest.approx(2**0.5)


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=8, unique=True).map(sorted))
def test_sizes_between_lie_between(sizes: Sequence[int]) -> None:
    between = sizes_between(sizes)
    assert not set(between) & set(sizes)
    assert all(sizes[0] < size < sizes[-1] for size in between)
    assert len(between) <= len(sizes) - 1


@given(st.integers(1, 300), st.sets(st.integers(1, 300)), st.integers(0, 9))
def test_probes_are_new_sizes(largest: int, known: set[int], count: int) -> None:
    drawn = probe_sizes(largest, known, count, random.Random(0))
    assert len(drawn) == len(set(drawn)) == min(count, len(set(range(1, largest + 1)) - known))
    assert not set(drawn) & known
    assert all(1 <= size <= largest for size in drawn)


def test_few_kernels_do_for_sizes_that_they_are_as_good_at(variant_builder: VariantBuilder) -> None:
    one, two, three = by_layout[WIDE][1:4]
    grid = [
        raced(variant_builder, {DEFAULT: 100, one: 50, two: 50.5, three: 90}, 1),
        raced(variant_builder, {DEFAULT: 100, one: 80, two: 50.5, three: 50}, 8),
        raced(variant_builder, {DEFAULT: 100, one: 99, two: 50, three: 80}, 64),
    ]
    keys = distil(grid, WIDE_ONES)
    assert keys == [variant_builder.variant(two).key]
    chosen = assign(grid, keys, WIDE_ONES)
    assert [each.key for each in chosen] == keys * 3
    assert cost_of(grid, chosen, WIDE_ONES) == pytest.approx((1.01 * 1.01) ** (1 / 3))


def test_nobody_serves_where_the_default_is_faster(variant_builder: VariantBuilder) -> None:
    one = by_layout[WIDE][1]
    grid = [raced(variant_builder, {DEFAULT: 100, one: 50}, 1), raced(variant_builder, {DEFAULT: 100, one: 150}, 8)]
    keys = [variant_builder.variant(config).key for config in (one, DEFAULT)]
    assert [each.key for each in assign(grid, keys, WIDE_ONES)] == keys


def test_a_switch_must_be_worth_it(variant_builder: VariantBuilder) -> None:
    one, two = by_layout[WIDE][1:3]
    keys = [variant_builder.variant(config).key for config in (one, two)]
    grid = [
        raced(variant_builder, {DEFAULT: 100, one: 50, two: time}, rows)
        for rows, time in ((1, 60), (4, 49.9), (16, 60))
    ]
    assert [each.key for each in assign(grid, keys, WIDE_ONES)] == [keys[0]] * 3


def test_a_crossing_is_narrowed_by_races(variant_builder: VariantBuilder) -> None:
    one, two = by_layout[WIDE][1:3]
    below, above = (variant_builder.variant(config).key for config in (one, two))
    crossing = Crossing(below, above, 4, 64)
    assert (crossing.middle, crossing.last_below) == (16, 16)
    later = crossing.narrowed(raced(variant_builder, {DEFAULT: 100, one: 40, two: 50}, 16))
    assert (later.low, later.high) == (16, 64)
    earlier = crossing.narrowed(raced(variant_builder, {DEFAULT: 100, one: 50, two: 40}, 16))
    assert (earlier.low, earlier.high) == (4, 16)
    here = crossing.narrowed(raced(variant_builder, {DEFAULT: 100, one: 50, two: 50}, 16))
    assert (here.last_below, here.middle) == (16, None)


def test_a_plan_switches_where_it_was_measured_and_keeps_the_evidence_of_tuned_sizes(
    variant_builder: VariantBuilder,
) -> None:
    one, two = by_layout[WIDE][1:3]
    grid = [raced(variant_builder, {DEFAULT: 100, one: 50 + rows, two: 110 - rows}, rows) for rows in (4, 16, 32, 64)]
    keys = [variant_builder.variant(config).key for config in (one, two)]
    chosen = [each.of(key) for each, key in zip(grid, [keys[0], keys[0], keys[1], keys[1]], strict=True)]
    entries = plan_entries(grid, [each for each in chosen if each], {16: 21}, {4, 16, 64})
    assert [(e.max_size, e.tuned_size, e.kernel_key) for e in entries] == [
        (8, 4, keys[0]),
        (21, 16, keys[0]),
        (None, 64, keys[1]),
    ]
    assert (entries[0].median_us, entries[0].default_us) == (54, 100)


def test_a_substitute_serves_around_its_sizes() -> None:
    entries = [PlanEntry(20, "a", 5.0, 9.0, 4), PlanEntry(None, "b", 50.0, 90.0, 64)]
    made = substituted(entries, [1, 4, 16, 64], {16: Substitute(None, 7.0, 8.0)})
    assert [(e.max_size, e.kernel_key, e.median_us, e.default_us) for e in made] == [
        (8, "a", 5.0, 9.0),
        (32, None, 7.0, 8.0),
        (None, "b", 50.0, 90.0),
    ]
    assert substituted(entries, [1, 4, 16, 64], {}) == tuple(entries)
    last = substituted(entries, [1, 4, 16, 64], {64: Substitute("c", 40.0)})
    assert [(e.max_size, e.kernel_key) for e in last] == [(20, "a"), (32, "b"), (None, "c")]
    first = substituted(entries, [1, 4], {1: Substitute(None, 1.0)})
    assert [(e.max_size, e.kernel_key) for e in first] == [(2, None), (20, "a"), (None, "b")]
