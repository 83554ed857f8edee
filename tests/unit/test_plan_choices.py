"""Which kernels a plan is made of, by simulated last races: equal kernels give the same plan, truly faster ones win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint, Variant, VariantBuilder
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.plan.constraint import Finalist, Raced, noise_near, settle
from tilewright.tuner.plan.distil import Crossing, assign, distil
from tilewright.tuning_db.records import Outcome, Timing

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
DEFAULT = OP.default_config(SIGNATURE, ARCH)
SIZES = (1, 4, 16, 64, 256)
LAPS = 30
Times = Mapping[Config, Sequence[float]]
"""In us at each of the sizes, in truth."""


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Variant]:
    builder = {"cpp": CppBuilder(ARCH, Compiler("no-compiler", "none"), tmp_path_factory.mktemp("builds"))}
    return cache(VariantBuilder(OP, SIGNATURE, ARCH, builder).variant)


Variants = Callable[[Config], Variant]


@pytest.fixture(scope="module")
def wide(variant: Variants) -> list[Config]:
    """Five configs of the default's weight layout, by ascending key."""
    return alike(variant, lambda layout: layout == variant(DEFAULT).layout_key)


@pytest.fixture(scope="module")
def narrow(variant: Variants) -> list[Config]:
    """Five of another."""
    return alike(variant, lambda layout: layout != variant(DEFAULT).layout_key)


def alike(variant: Variants, wanted: Callable[[str], bool]) -> list[Config]:
    space = OP.space(SIGNATURE, ARCH)[:4000]
    fitting = [c for c in space if c != DEFAULT and wanted(OP.layout_key(SIGNATURE, c, ARCH))]
    one = OP.layout_key(SIGNATURE, fitting[0], ARCH)
    found = [config for config in fitting if OP.layout_key(SIGNATURE, config, ARCH) == one][:5]
    assert len(found) == 5
    return sorted(found, key=lambda config: variant(config).key)


def raced(
    variant: Variants,
    true_us: Times,
    seed: int,
    *,
    noise: float = 0.03,
    timing: Timing = "measured",
    starts: Sequence[Config] = (),
    sizes: Sequence[int] = SIZES,
) -> list[Raced]:
    """Last races at every size: interleaved laps on a machine that drifts; each with the noise of a kernel itself."""
    random = np.random.default_rng(seed)
    grid = []
    for at, size in enumerate(sizes):
        drift = np.exp(np.cumsum(random.normal(0, 0.01, LAPS)))
        right = []
        for config, times in true_us.items():
            samples = times[at] * drift * random.lognormal(0, noise, LAPS)
            if timing == "predicted":
                evaluation = Evaluation(variant(config).key, Outcome.OK, median_us=times[at], timing=timing)
            else:
                median = float(np.median(samples))
                evaluation = Evaluation(
                    variant(config).key, Outcome.OK, samples_us=tuple(samples.tolist()), median_us=median
                )
            standing = 0 if config == DEFAULT else 1 if config in starts else 2
            right.append(Finalist(BuildResult(variant(config), None, "", 0.0), evaluation, standing))
        default = next(each for each in right if each.standing == 0)
        aa = Ratio(1.0, 1 - noise / 3, 1 + noise / 3, LAPS)
        grid.append(Raced(OP.problem(SIGNATURE, size, RoutingSpec.parse("balanced")), tuple(right), default, aa))
    return grid


def plan(grid: Sequence[Raced]) -> tuple[Config, ...]:
    """What serves at each size."""
    settled = settle(grid)
    chosen = assign(grid, distil(grid, settled.constraints), settled.constraints)
    return tuple(finalist.built.variant.config for finalist in chosen)


def always(time_us: float) -> list[float]:
    return [time_us] * len(SIZES)


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.08])
def test_of_equal_kernels_the_default_serves_in_nineteen_plans_of_twenty(
    variant: Variants, wide: list[Config], narrow: list[Config], noise: float
) -> None:
    """Ten kernels in two layouts, at five sizes."""
    equal = {config: always(100.0) for config in (*wide, *narrow, DEFAULT)}
    plans = [plan(raced(variant, equal, seed, noise=noise)) for seed in range(60)]
    assert sum(each != (DEFAULT,) * len(SIZES) for each in plans) <= 3


def test_two_tunes_choose_the_same_of_equal_winners(variant: Variants, wide: list[Config]) -> None:
    """That whose key is the smallest; and of the op's starting configs, if one is among them."""
    times = {DEFAULT: always(100.0)} | {config: always(80.0) for config in reversed(wide)}
    for seed in range(10):
        assert plan(raced(variant, times, seed)) == (wide[0],) * len(SIZES)
        assert plan(raced(variant, times, seed, starts=[wide[3]])) == (wide[3],) * len(SIZES)


def test_the_first_of_equal_winners_is_no_match_for_a_faster_one(variant: Variants, wide: list[Config]) -> None:
    times = {DEFAULT: always(100.0), wide[0]: always(80.0), wide[4]: always(70.0)}
    for seed in range(10):
        assert plan(raced(variant, times, seed, starts=[wide[0]])) == (wide[4],) * len(SIZES)


def test_a_layout_replaces_the_default_s_if_it_is_faster_beyond_the_noise(
    variant: Variants, wide: list[Config], narrow: list[Config]
) -> None:
    equal = {DEFAULT: always(100.0), wide[0]: always(80.0), narrow[0]: always(80.0)}
    faster = equal | {narrow[0]: always(72.0)}
    layouts = {config: (PlanConstraint(variant(config).layout_key),) for config in (DEFAULT, narrow[0])}
    for seed in range(20):
        assert settle(raced(variant, equal, seed)).constraints == layouts[DEFAULT]
        assert settle(raced(variant, faster, seed)).constraints == layouts[narrow[0]]


@pytest.mark.parametrize(("saved", "worth_it"), [(0.015, False), (0.03, True)])
def test_a_second_layout_must_save_two_percent_of_the_time(
    variant: Variants, narrow: list[Config], saved: float, worth_it: bool
) -> None:
    """Over all sizes together, which is what its memory costs; it is faster at one of them."""
    times = {DEFAULT: always(100.0), narrow[0]: [100.0 * (1 - saved) ** len(SIZES), *[150.0] * (len(SIZES) - 1)]}
    grid = raced(variant, times, seed=0, noise=0.0005)
    layouts = [variant(config).layout_key for config in (DEFAULT, narrow[0])]
    assert settle(grid).layout == layouts[0]
    assert settle(grid, copies=2).layout == "+".join(layouts[: 1 + worth_it])
    assert (settle(grid).another is not None) is worth_it


def test_kernels_that_cross_share_the_sizes_between_them(variant: Variants, wide: list[Config]) -> None:
    small, large = wide[:2]
    times = {DEFAULT: always(100.0), small: [50.0, 60.0, 80.0, 99.0, 120.0], large: [120.0, 99.0, 80.0, 60.0, 50.0]}
    for seed in range(10):
        chosen = plan(raced(variant, times, seed))
        assert (chosen[:2], chosen[3:]) == ((small,) * 2, (large,) * 2)
        assert chosen[2] in (small, large)


def test_few_kernels_are_enough_for_what_the_noise_hides(variant: Variants, wide: list[Config]) -> None:
    """Each is the fastest somewhere, by 1 %."""
    times = {DEFAULT: always(100.0)}
    times |= {config: [79.2 if at == place else 80.0 for at in range(len(SIZES))] for place, config in enumerate(wide)}
    for seed in range(10):
        assert len(set(plan(raced(variant, times, seed)))) == 1


def test_a_kernel_does_not_hand_over_and_back_for_a_size_at_which_the_default_is_as_fast(
    variant: Variants, wide: list[Config]
) -> None:
    one = wide[0]
    between = {DEFAULT: always(100.0), one: [70.0, 70.0, 100.0, 70.0, 70.0]}
    at_the_end = {DEFAULT: always(100.0), one: [70.0, 70.0, 70.0, 70.0, 100.0]}
    for seed in range(10):
        assert plan(raced(variant, between, seed)) == (one,) * 5
        assert plan(raced(variant, at_the_end, seed)) == (*(one,) * 4, DEFAULT)


def test_a_kernel_that_is_only_as_fast_as_the_default_does_not_keep_away_one_that_replaces_it(
    variant: Variants, wide: list[Config]
) -> None:
    """At the last two sizes the one is told apart from neither, and the other replaces the default."""
    one, other = wide[:2]
    times = {DEFAULT: always(100.0), one: [50.0, 50.0, 50.0, 98.5, 98.5], other: [60.0, 60.0, 60.0, 97.0, 97.0]}
    assert plan(raced(variant, times, seed=0, noise=0.0005)) == (one, one, one, other, other)


@pytest.mark.parametrize("named", [False, True])
def test_the_default_serves_where_it_replaces_all_that_were_kept(
    variant: Variants, wide: list[Config], named: bool
) -> None:
    one = wide[0]
    grid = raced(variant, {DEFAULT: always(100.0), one: [50.0, 50.0, 200.0, 200.0, 50.0]}, seed=0)
    constraints = settle(grid).constraints
    keys = [variant(config).key for config in ((one, DEFAULT) if named else (one,))]
    chosen = [each.built.variant.config for each in assign(grid, keys, constraints)]
    assert chosen == [one, one, DEFAULT, DEFAULT, one]


def test_what_the_default_replaces_does_not_serve_though_the_default_may_not_either(
    variant: Variants, narrow: list[Config]
) -> None:
    """In another layout than the default's: a further switch is worth that."""
    one, two = narrow[:2]
    times = {DEFAULT: always(100.0), one: [50.0, 50.0, 104.0, 50.0, 50.0], two: [99.0, 99.0, 103.9, 99.0, 99.0]}
    # By so little that two switches would cost more than they save.
    slightly = {one: [50.0, 50.0, 102.5, 50.0, 50.0], two: [99.0, 99.0, 101.5, 99.0, 99.0]}
    slower = raced(variant, times | slightly, seed=0, noise=0.0005)
    constraints = [PlanConstraint(variant(one).layout_key)]
    keys = [variant(config).key for config in (one, two)]
    assert [each.built.variant.config for each in assign(slower, keys, constraints)] == [one, one, two, one, one]
    neither = raced(variant, times, seed=0, noise=0.0005)
    assert [each.built.variant.config for each in assign(neither, keys, constraints)][2] in (one, two)


@pytest.mark.parametrize(("predicted_us", "serves"), [(96.0, False), (94.0, True)])
def test_a_predicted_gain_must_exceed_what_the_model_is_off_by(
    variant: Variants, wide: list[Config], predicted_us: float, serves: bool
) -> None:
    times = {DEFAULT: always(100.0), wide[0]: always(predicted_us)}
    grid = raced(variant, times, seed=0, noise=0.15, timing="predicted")  # a third of it is the noise
    assert plan(grid) == ((wide[0] if serves else DEFAULT),) * len(SIZES)


@pytest.mark.parametrize(
    ("below_us", "above_us", "expected"), [(90.0, 100.0, (16, 64)), (100.0, 90.0, (4, 16)), (100.0, 100.0, (16, 17))]
)
def test_a_crossing_is_where_neither_replaces_the_other(
    variant: Variants, wide: list[Config], below_us: float, above_us: float, expected: tuple[int, int]
) -> None:
    below, above = wide[:2]
    crossing = Crossing(variant(below).key, variant(above).key, 4, 64)
    for seed in range(10):
        (each,) = raced(variant, {DEFAULT: [200.0], below: [below_us], above: [above_us]}, seed, noise=0.02, sizes=[16])
        narrowed = crossing.narrowed(each)
        assert (narrowed.low, narrowed.high) == expected


def test_a_size_has_the_noise_of_the_nearest_at_which_it_is_known(variant: Variants) -> None:
    grid = [
        Raced(
            each.problem, each.right, each.default, Ratio(1.0, 0.9, 1 + each.size / 1000, 9) if each.size > 1 else None
        )
        for each in raced(variant, {DEFAULT: always(100.0)}, seed=0)
    ]
    found = {size: noise_near(grid, size) for size in (1, 7, 9, 1000)}
    assert [noise.high for noise in found.values() if noise] == pytest.approx([1.004, 1.004, 1.016, 1.256])
    assert noise_near([], 4) is None


def test_a_kernel_that_dropped_out_of_a_race_early_is_not_as_fast_as_its_winner(
    variant: Variants, wide: list[Config]
) -> None:
    """Two samples prove nothing of a kernel, least of all that the winner would not take its place."""
    few, many = wide[:2]
    keys = [variant(few).key, variant(many).key]
    times = {DEFAULT: (100.0,) * 5, few: (40.0, 40.0, 60.0, 60.0, 60.0), many: (60.0, 60.0, 40.0, 40.0, 40.0)}

    def cut_short(each: Raced, finalist: Finalist) -> Finalist:
        if finalist.key not in keys or finalist is each.best:
            return finalist
        return replace(finalist, evaluation=replace(finalist.evaluation, samples_us=finalist.evaluation.samples_us[:2]))

    for seed in range(20):
        grid = [
            replace(each, right=tuple(cut_short(each, finalist) for finalist in each.right))
            for each in raced(variant, times, seed)
        ]
        constraint = variant(few).constraint
        assert constraint is not None
        assert sorted(distil(grid, [constraint])) == sorted(keys)
        assert [each.key for each in assign(grid, keys, [constraint])] == [keys[0]] * 2 + [keys[1]] * 3
