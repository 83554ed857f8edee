"""A frozen plan put to the test: a kernel that is slow between the tuned sizes is caught there, and replaced."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from naive_kernels import Built, build, needs_compiler, store_plan

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.tuner.campaign.campaign import Alternative, SignatureReport
from tilewright.tuner.campaign.proving import prove_plans
from tilewright.tuner.campaign.variants import PlanConstraint
from tilewright.tuner.plan.deployed import DeployedRaces, RaceLost
from tilewright.tuner.plan.finals import Verdict
from tilewright.tuner.plan.prove import Default, Proof, Prover
from tilewright.tuning_db.records import PlanEntry, PlanRecord
from tilewright.tuning_db.store import Store

pytestmark = needs_compiler

OP = find_op("moe_gemm")
SIGNATURE = MoeGemmSignature(stage="plain", experts=2, n=4, k=4)
LAYOUT = WeightLayout(4)
TUNED = (1, 8, 256)
SLOW = (12, 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture(scope="module")
def races() -> Iterator[DeployedRaces]:
    with DeployedRaces() as races:
        yield races


Prove = Callable[..., Proof]


@pytest.fixture
def prove(folder: Path, races: DeployedRaces) -> Prove:
    return partial(put_to_the_test, races, folder)


def put_to_the_test(
    races: DeployedRaces, folder: Path, kernel: Built, default: Built, *, joins: bool = True, probes: int = 6
) -> Proof:
    """Put a plan to the test that serves all sizes with ``kernel``."""
    path = store_plan(folder / "tuning.db", SIGNATURE, [(None, kernel)])
    with Store.open(path) as store:
        store.add_kernel(default.record, [default.artifact])
        (plan,) = store.plans()
        prover = Prover(OP, store, races, threads=1, seed=0, budget_s=0.5, say=lambda _: None)
        grid = [OP.problem(SIGNATURE, size, RoutingSpec.parse("balanced")) for size in TUNED]
        return prover.prove(plan, grid, Default(default.record.key, LAYOUT.key, joins), probes)


def served(plan: PlanRecord, size: int) -> str | None:
    entry = plan.entry_for(size)
    assert entry is not None
    return entry.kernel_key


def test_a_plan_that_is_fast_everywhere_stays_as_it_is(prove: Prove) -> None:
    kernel, default = build(SIGNATURE, layout=LAYOUT), build(SIGNATURE, layout=LAYOUT, salt=1, slow_sizes=(1, 1 << 40))
    proof = prove(kernel, default)
    assert proof.mends == ()
    assert [entry.kernel_key for entry in proof.plan.entries] == [kernel.record.key]
    assert (len(proof.rounds), proof.drawn, len(proof.last)) == (1, 6, 6)
    assert not set(proof.rounds[0]) & set(TUNED)
    assert {row.size for row in proof.rows} == {*TUNED, *proof.rounds[0]}


def test_what_is_slow_between_tuned_sizes_is_caught_and_the_default_serves_there(prove: Prove) -> None:
    kernel, default = build(SIGNATURE, layout=LAYOUT, slow_sizes=SLOW), build(SIGNATURE, layout=LAYOUT, salt=1)
    proof = prove(kernel, default)
    assert proof.mends
    assert len(proof.rounds) > 1
    assert all(SLOW[0] <= mend.size <= SLOW[1] for mend in proof.mends)
    assert "default" in {mend.by for mend in proof.mends}
    for row in proof.rows:
        if SLOW[0] <= row.size <= SLOW[1] and row.size not in proof.rounds[-1]:
            assert served(proof.plan, row.size) != kernel.record.key
            assert row.served.median < 10_000  # raced again, since it was mended
    for size in TUNED:
        assert served(proof.plan, size) == kernel.record.key


def test_torch_serves_where_the_default_may_not(prove: Prove) -> None:
    default = build(SIGNATURE, salt=1, slow_sizes=(1, 1 << 40))
    kernel = build(SIGNATURE, layout=LAYOUT, slow_sizes=SLOW)
    proof = prove(kernel, default, joins=False)
    assert "torch" in {mend.by for mend in proof.mends}
    assert default.record.key not in {entry.kernel_key for entry in proof.plan.entries}
    entry = next(entry for entry in proof.plan.entries if entry.kernel_key is None)
    assert entry.median_us is not None
    assert entry.default_us is not None


def reported(plan: PlanRecord, default: Built, layout: WeightLayout) -> SignatureReport:
    """What a campaign that chose ``plan`` leaves behind, as far as the test of its plans asks for it."""
    constraint = PlanConstraint(default.layout_key)
    variant = SimpleNamespace(key=default.record.key, layout_key=default.layout_key, constraint=constraint)
    default_finalist = SimpleNamespace(built=SimpleNamespace(variant=variant))
    problems = [OP.problem(SIGNATURE, size, RoutingSpec.parse("balanced")) for size in TUNED]
    grid = [SimpleNamespace(size=p.size, problem=p, noise=None, default=default_finalist) for p in problems]
    verdict = SimpleNamespace(grid=grid, finals=(), settled=SimpleNamespace(constraints=(PlanConstraint(layout.key),)))
    return SignatureReport(SIGNATURE, verdict=cast("Verdict", verdict), plan=plan)


OTHER_LAYOUT = WeightLayout(2)


@pytest.mark.parametrize(
    ("slow_sizes", "by_default", "gives_way"),
    [(SLOW, (1, 0), True), ((1, 0), (1, 1 << 40), False), (SLOW, SLOW, False)],
    ids=["where the default is faster", "where it is not", "where the default is slow there, too"],
)
def test_a_plan_that_the_default_cannot_join_gives_way_to_one_that_it_can(
    folder: Path,
    races: DeployedRaces,
    slow_sizes: tuple[int, int],
    by_default: tuple[int, int],
    gives_way: bool,
) -> None:
    """Torch has no part in it: it may not serve in a batch-invariant plan."""
    kernel = build(SIGNATURE, layout=OTHER_LAYOUT, slow_sizes=slow_sizes)
    default = build(SIGNATURE, layout=LAYOUT, salt=1, slow_sizes=by_default)
    path = store_plan(folder / "tuning.db", SIGNATURE, [(None, kernel)])
    with Store.open(path) as store:
        store.add_kernel(default.record, [default.artifact])
        plan = replace(store.plans()[0], batch_invariant=True)
        within = replace(plan, layout=LAYOUT.key, entries=(PlanEntry(None, default.record.key),))
        mine = reported(plan, default, OTHER_LAYOUT)
        other = reported(within, default, LAYOUT).verdict
        assert other is not None
        mine.alternative = Alternative(other, within)
        prover = Prover(OP, store, races, threads=1, seed=0, budget_s=0.5, say=lambda _: None)
        prove_plans(mine, prover, store, 6, lambda _: None)
        assert mine.plan is not None
        assert mine.proof is not None
        assert mine.proof.plan == mine.plan
        assert mine.plan in store.plans()
        assert mine.plan.layout == (LAYOUT if gives_way else OTHER_LAYOUT).key
        assert (mine.verdict is other) is gives_way
        assert "default" not in {each["than"] for each in mine.plan.facts["probed"]["slower"]}
        assert served(mine.plan, 100) == (default if gives_way else kernel).record.key


def test_nothing_is_drawn_unless_it_is_asked_for(prove: Prove) -> None:
    kernel, default = build(SIGNATURE, layout=LAYOUT, slow_sizes=SLOW), build(SIGNATURE, layout=LAYOUT, salt=1)
    proof = prove(kernel, default, probes=0)
    assert (proof.mends, proof.drawn) == ((), 0)
    assert [row.size for row in proof.rows] == list(TUNED)


def test_a_kernel_that_fails_loses_the_race_alone(folder: Path) -> None:
    path = store_plan(folder / "tuning.db", SIGNATURE, [(None, build(SIGNATURE, layout=LAYOUT, fail=True))])
    problem = OP.problem(SIGNATURE, 4, RoutingSpec.parse("balanced"))
    with DeployedRaces() as races, pytest.raises(RaceLost, match="7"):
        races.race([problem], served=path, default=None, threads=1, seed=0, budget_s=0.1)
