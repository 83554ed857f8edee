"""Time against error: which precisions get a plan, and what is said of those that get none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuner.campaign.precision import FrontPoint, front, left_out
from tilewright.tuner.evaluation.checking import PrecisionError


def point(precision: str, error: float, *times_us: float) -> FrontPoint:
    finals: Any = tuple(SimpleNamespace(winner_us=SimpleNamespace(median_us=time_us)) for time_us in times_us)
    plan: Any = None
    return FrontPoint(precision, PrecisionError(error, error), finals, plan)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1, max_size=8))
def test_the_front_holds_what_no_other_point_beats(pairs: list[tuple[float, float]]) -> None:
    points = [point(f"p{index}", error, time_us) for index, (error, time_us) in enumerate(pairs)]
    kept = front(points)
    assert [each.error.relative for each in kept] == sorted(each.error.relative for each in kept)
    for each in points:
        better = [p for p in kept if p.error.relative <= each.error.relative and p.time_us <= each.time_us]
        assert better, "beaten by none, yet not kept"
        assert each not in kept or better == [each]


def test_what_gets_no_plan_is_told_why() -> None:
    points = [
        point("fp32+int8", 0.008, 40.0, 90.0),
        point("int8g128", 0.007, 50.0, 200.0),
        point("int4g32", 0.08, 70.0),
    ]
    chosen = front(points)
    assert [each.precision for each in chosen] == ["int8g128", "fp32+int8"]
    said = left_out(["fp32", "int8", "int8g128", "int4g32", "mxfp4"], points, chosen)
    assert said == [
        "precision int4g32 gets no plan: another one is as exact and as fast",
        "precision mxfp4 gets no plan: no kernel was tried and right at every size; more --trials may find one",
    ]
