"""Rows of races of a served plan: one race each, what it decides, and how it is shown."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.tuner.commands.findings import HEAD, Findings
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.plan.constraint import Final
from tilewright.tuner.plan.deployed import Deployed
from tilewright.tuner.plan.prove import Default, Mend, Substitute, mend_for
from tilewright.tuner.report.roofline import Roofline
from tilewright.tuning_db.records import Outcome

OP = find_op("moe_gemm")
PROBLEM = OP.problem(MoeGemmSignature(stage="plain", experts=2, n=8, k=8), 4, RoutingSpec.parse("balanced"))
DEFAULT = Default("the-default", "a-layout", joins=True)


def raced(served_us: float, torch_us: float, default_us: float | None, *, calls: int = 9, **more: Any) -> Deployed:
    """A race on a machine on which a stall now and then hits all three."""
    weather = np.where(np.arange(calls) % 3 == 1, 8.0, 1.0) * np.random.default_rng(0).lognormal(0, 0.01, calls)
    served, torch, default = (
        None if time_us is None else tuple((time_us * weather).tolist())
        for time_us in (served_us, torch_us, default_us)
    )
    assert served
    assert torch
    return Deployed(4, served, torch, default, error=0.0, **more)


@pytest.mark.parametrize(
    ("times", "mend"),
    [
        ((50.0, 100.0, 100.0), None),
        ((100.0, 99.0, 99.0), None),
        ((100.0, 200.0, 80.0), "default"),
        ((100.0, 80.0, 200.0), "torch"),
        ((100.0, 80.0, 80.0), "default"),
        ((100.0, 60.0, 80.0), "torch"),
        ((100.0, 80.0, None), "torch"),
    ],
    ids=["fastest", "within what races resolve", "default", "torch", "both alike", "torch beats both", "no default"],
)
def test_what_serves_instead_replaces_what_was_served(
    times: tuple[float, float, float | None], mend: str | None
) -> None:
    found = mend_for(raced(*times), DEFAULT, batch_invariant=False)
    assert (found[0] if found else None) == (Mend(4, mend) if mend else None)


def test_what_is_faster_within_the_noise_mends_nothing() -> None:
    assert mend_for(raced(100.0, 80.0, 80.0, noise=0.25), DEFAULT, batch_invariant=False) is None


def test_torch_has_no_part_in_a_batch_invariant_plan_nor_the_default_in_another_layout() -> None:
    row = raced(100.0, 60.0, 80.0)
    by_default = mend_for(row, DEFAULT, batch_invariant=True)
    assert by_default
    assert by_default[0].by == "default"
    assert by_default[1].kernel_key == "the-default"
    stranger = Default("the-default", "another-layout", joins=False)
    assert mend_for(row, stranger, batch_invariant=True) is None
    by_torch = mend_for(row, stranger, batch_invariant=False)
    assert by_torch
    assert by_torch[1] == Substitute(None, row.torch.median, row.default.median if row.default else None)


def shown(row: Deployed | None) -> dict[str, str]:
    """A row of the table, by its heads: the last race of the finalists said 40 and 90 us, at another moment."""
    variant = SimpleNamespace(key="the-default", config={})
    evaluation = [Evaluation("", Outcome.OK, median_us=time_us) for time_us in (40.0, 90.0)]
    built = cast("Any", SimpleNamespace(variant=variant))
    final = Final(
        PROBLEM, built, evaluation[0], built, evaluation[1], Ratio(2.25, 2.2, 2.3, 9), Ratio(1, 0.99, 1.02, 9)
    )
    mine = SimpleNamespace(
        signature=PROBLEM.signature, proof=SimpleNamespace(rows=(row,) if row else ()), finals=[final]
    )
    report = cast("Any", SimpleNamespace(signatures=[mine]))
    request = cast("Any", SimpleNamespace(op=OP, seed=0))
    findings = Findings(report, request, Roofline(1, 100.0, 10.0), "here")
    (cells,) = findings.rows(cast("Any", mine))
    return dict(zip(HEAD, cells, strict=True))


def test_the_ratios_of_a_row_are_those_of_the_times_beside_them() -> None:
    row = raced(20.0, 50.0, 30.0)
    cells = shown(row)
    us = {name: float(cells[name].removesuffix(" us")) for name in ("torch", "default", "tuned")}
    assert us == pytest.approx(
        {"torch": row.torch.median, "default": 1.5 * us["tuned"], "tuned": us["tuned"]}, rel=0.01
    )
    assert float(cells["vs default"].split("x")[0]) == pytest.approx(us["default"] / us["tuned"], rel=0.01)
    assert float(cells["vs torch"].split("x")[0]) == pytest.approx(us["torch"] / us["tuned"], rel=0.01)
    assert cells["kernel"] == "torch"


def test_without_a_race_of_the_plan_a_row_is_the_last_race_of_the_finalists() -> None:
    cells = shown(None)
    assert (cells["torch"], cells["vs torch"]) == ("-", "-")
    assert (cells["default"], cells["tuned"]) == ("90.0 us", "40.0 us")
    assert cells["vs default"] == "2.25x 2.20-2.30"


def test_a_race_without_the_default_says_nothing_of_it() -> None:
    cells = shown(raced(20.0, 50.0, None, kernel_key="the-default"))
    assert (cells["default"], cells["vs default"], cells["kernel"]) == ("-", "-", "the default")


def test_too_few_calls_for_an_interval_are_said_to_be() -> None:
    cells = shown(raced(20.0, 50.0, 30.0, calls=2))
    assert cells["vs torch"] == "2.50x n=2, no interval"
    document = raced(20.0, 50.0, 30.0, calls=2).document()
    assert document["speedup"] == {"median": pytest.approx(2.5), "low": None, "high": None, "samples": 2}
    assert (document["served"]["low_us"], document["served"]["samples"]) == (None, 2)
