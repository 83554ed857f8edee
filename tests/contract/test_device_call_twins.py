"""The extension and its Python twin make the same launches on a CUDA device, byte for byte: recipes drawn at random.

The driver is a stand-in (tests/standin), and tensors are posed ones (tests/posing.py); nothing of it ran on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_standin import StandIn
from device_calls import NAMES, ROWS_OF_X, Bench, launch, opened_bench, recipe_of, same, tensors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from posing import let_calls_take_them, on_stream, pose

from tilewright.codegen.recipe.model import Argument, Guard, Recipe
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.device import DeviceCall
from tilewright.runtime.calls.extension import native_for_torch
from tilewright.runtime.notices import forget_warnings

FULL = os.environ.get("TILEWRIGHT_FULL") == "1"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with opened_bench() as opened:
        yield opened


@pytest.fixture(autouse=True)
def posed_tensors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.cuda.begin([90, 80, 90])
    let_calls_take_them(monkeypatch)


counts = st.recursive(
    st.sampled_from(["rows", "tokens", "sm_count"]) | st.integers(0, 40).map(str),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//"]), inner)
        | st.builds("{}({}, {})".format, st.sampled_from(["min", "max", "ceildiv"]), inner, inner)
    ),
    max_leaves=3,
)
offsets = st.sampled_from(["", "0", "rows * 16", "tokens * 16", "64"]) | counts
maps = (
    st.none()
    | st.none()
    | st.just(ROWS_OF_X)
    | st.builds(
        lambda text, promotion: replace(ROWS_OF_X, shape=(text, "4"), l2_promotion=promotion), counts, st.integers(0, 3)
    )
)
arguments = st.one_of(
    st.builds(Argument, st.just("tensor"), st.sampled_from(NAMES), maps),
    st.builds(Argument, st.just("size"), counts),
    st.builds(Argument, st.just("workspace"), offsets, maps),
    st.builds(Argument, st.just("scales"), offsets),
)
clusters = st.sampled_from([(), (), ("2",), ("1", "2"), ("16",)])
launches = st.builds(
    lambda given, grid, block, cluster, **rest: launch(*given, grid=tuple(grid), block=block, cluster=cluster, **rest),
    st.lists(arguments, max_size=6),
    st.lists(counts | st.sampled_from(["rows * 16", "sm_count"]), min_size=1, max_size=3),
    st.sampled_from([("32",), ("128",), ("rows * 8", "2"), ("tokens",)]),
    clusters,
    shared_memory_bytes=st.sampled_from(["0", "1024", "65536"]),
    hidden_arguments=st.integers(0, 2),
    programmatic=st.booleans(),
    cooperative=st.booleans(),
)
guards = st.one_of(
    st.builds(Guard, counts, st.integers(1, 3)),
    st.builds(Guard, st.sampled_from(["x", "y", "out", "weight", "workspace"]), st.sampled_from([1, 4, 16, 3])),
)
recipes = st.builds(
    lambda launches, nbytes, guards, zeroed: recipe_of(
        *launches, workspace_bytes=nbytes, guards=tuple(guards), workspace_zeroed=zeroed
    ),
    st.lists(launches, min_size=1, max_size=3),
    st.sampled_from(["rows * 64 + 4096", "rows * 64 + 4096", "0"]) | counts,
    st.lists(guards, max_size=1),
    st.booleans(),
)
own_settings = settings(
    phases=[Phase.explicit, Phase.generate],
    max_examples=1500 if FULL else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(cuda: StandIn, call: Callable[..., Any], given: list[Any], stream: int) -> tuple[str, Any]:
    """What became of a call: its launches, or what was said."""
    forget_warnings()
    getattr(call, "twin", call)._told_of.clear()
    before = len(cuda.launches)
    said: list[str] = []
    error: TilewrightError | None = None
    with pytest.MonkeyPatch.context() as patch, on_stream(stream):
        patch.setattr("tilewright.runtime.calls.checked.warn_once", said.append)
        try:
            assert call(*given) is given[-1]
        except TilewrightError as caught:
            error = caught
    made = [same(each) for each in cuda.launches[before:]]
    if error is not None:
        assert str(error).startswith("demo: ")
        assert "\n" not in str(error)
        return "refused", (str(error), made)
    if said:
        assert made == []
        return "torch", said
    return "launched", made


@own_settings
@given(
    recipe=recipes,
    rows=st.integers(1, 30),
    tokens=st.integers(0, 30),
    absent=st.booleans(),
    skew=st.sampled_from([0, 0, 0, 1, 4]),
    number_bytes=st.sampled_from([8, 4]),
)
def test_both_twins_make_the_launches_that_the_recipe_asks_for(
    bench: Bench, recipe: Recipe, rows: int, tokens: int, absent: bool, skew: int, number_bytes: int
) -> None:
    if native_for_torch() is None:
        pytest.skip("the extension was not built")
    bench.cuda.begin([90, 80, 90])
    asked_twin: list[int] = []

    class Counting(DeviceCall):
        def __call__(self, *tensors: Any) -> Any:
            asked_twin.append(1)
            return super().__call__(*tensors)

    workspace, stream = bench.memory(1 << 20), bench.stream()
    workspace.fill_(0xFF)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilewright.runtime.calls.native.DeviceCall", Counting)
        call = bench.bind(
            bench.variant(recipe, number_bytes=number_bytes),
            fallback=lambda *_: None,
            workspace=lambda nbytes: pose(workspace[:nbytes]),
        )
    x = pose(torch.zeros(rows * 4 + skew)[skew:].view(-1, 4))
    given = tensors(rows, tokens, absent=absent, x=x)
    expected = outcome(bench.cuda, call.twin, given, stream)
    zeroed = workspace.clone()
    workspace.fill_(0xFF)
    asked_twin.clear()
    assert outcome(bench.cuda, call, given, stream) == expected
    assert torch.equal(workspace, zeroed)
    if expected[0] == "launched":
        assert asked_twin == [], "the extension handed over a call that it can make"
