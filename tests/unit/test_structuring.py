"""Dataclasses to JSON and back, and what is refused on the way."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.structuring import StructureError, structure, unstructure

NUMBERS = st.floats(allow_nan=False)
INTEGERS = st.integers(-(2**70), 2**70)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


@dataclass(frozen=True)
class Line:
    ends: tuple[Point, Point]


@dataclass(frozen=True)
class Drawing:
    name: str
    dims: tuple[int | str, ...]
    shape: Point | Line | None
    colour: Colour
    kind: Literal["pen", "brush"]
    filled: bool
    scale: float | None
    notes: dict[str, Any]

    def __post_init__(self) -> None:
        if self.name == "impossible":
            raise ValueError("that is impossible")


POINTS = st.builds(Point, INTEGERS, NUMBERS)
DRAWINGS = st.builds(
    Drawing,
    st.text(max_size=8).filter(lambda name: name != "impossible"),
    st.lists(INTEGERS | st.text(max_size=3), max_size=4).map(tuple),
    st.none() | POINTS | st.builds(Line, st.tuples(POINTS, POINTS)),
    st.sampled_from(Colour),
    st.sampled_from(["pen", "brush"]),
    st.booleans(),
    st.none() | NUMBERS,
    st.dictionaries(st.text(max_size=3), st.none() | INTEGERS | st.lists(st.booleans(), max_size=2), max_size=3),
)


@given(DRAWINGS)
def test_what_goes_through_json_comes_back(drawing: Drawing) -> None:
    assert structure(Drawing, json.loads(json.dumps(unstructure(drawing)))) == drawing


PLAIN = {
    "name": "a",
    "dims": [1, "rows"],
    "shape": {"ends": [{"x": 1, "y": 2.5}, {"x": 3, "y": 4.0}]},
    "colour": "red",
    "kind": "pen",
    "filled": True,
    "scale": 1.0,
    "notes": {"by": "hand"},
}


def test_the_json_form() -> None:
    line = Line((Point(1, 2.5), Point(3, 4.0)))
    drawing = Drawing("a", (1, "rows"), line, Colour.RED, "pen", filled=True, scale=1.0, notes={"by": "hand"})
    assert unstructure(drawing) == PLAIN
    assert structure(Drawing, PLAIN) == drawing


def test_numbers_of_numpy_become_python_s() -> None:
    plain = unstructure(Point(np.int64(3), np.float32(0.5)))  # type: ignore[arg-type]
    assert plain == {"x": 3, "y": 0.5}
    assert [type(value) for value in plain.values()] == [int, float]
    assert structure(Point, {"x": 1, "y": 2}).y.hex() == "0x1.0000000000000p+1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "Drawing.name: 1 is not a text"),
        ({"name": None}, "Drawing.name: None is not a text"),
        ({"dims": [1, 2.0]}, "Drawing.dims[1]: 2.0 is not an integer or a text"),
        ({"dims": [True]}, "Drawing.dims[0]: True is not an integer or a text"),
        ({"dims": "rows"}, "Drawing.dims: 'rows' is not a list"),
        ({"dims": None}, "Drawing.dims: None is not a list"),
        ({"shape": {"x": 1.5, "y": 1.0}}, "Drawing.shape.x: 1.5 is not an integer"),
        ({"shape": {"x": 1}}, "Drawing.shape: the field 'y' is missing"),
        ({"shape": {"x": 1, "y": 1, "z": 1}}, "Drawing.shape: there is no field 'z'"),
        ({"shape": {"ends": [{"x": 1, "y": 1.0}]}}, "Drawing.shape.ends: [{'x': 1, 'y': 1.0}] is not a list of 2"),
        ({"shape": {"ends": [{"x": 1, "y": 1}, 5]}}, "Drawing.shape.ends[1]: 5 is not an object"),
        ({"colour": "green"}, "Drawing.colour: 'green' is not one of 'red', 'blue'"),
        ({"kind": "pencil"}, "Drawing.kind: 'pencil' is not one of 'pen', 'brush'"),
        ({"filled": 1}, "Drawing.filled: 1 is not true or false"),
        ({"scale": "wide"}, "Drawing.scale: 'wide' is not a number or null"),
        ({"scale": True}, "Drawing.scale: True is not a number or null"),
        ({"scale": float("nan")}, "Drawing.scale: nan is not a number or null"),
        ({"notes": [1]}, "Drawing.notes: [1] is not an object"),
        ({"notes": {1: 2}}, "Drawing.notes: {1: 2} is not an object"),
        ({"name": ["long"] * 50}, "Drawing.name: " + str(["long"] * 50)[:57] + "... is not a text"),
        ({"extra": 1}, "Drawing: there is no field 'extra'"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_stands(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StructureError) as refused:
        structure(Drawing, {**PLAIN, **change})
    assert str(refused.value) == message


def test_what_is_missing_is_refused_although_it_has_a_default() -> None:
    with pytest.raises(StructureError, match=r"^Point: the field 'y' is missing$"):
        structure(Point, {"x": 1})
    with pytest.raises(StructureError, match=r"^Point: \[1\] is not an object$"):
        structure(Point, [1])  # type: ignore[arg-type]


def test_what_a_dataclass_itself_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="that is impossible"):
        structure(Drawing, {**PLAIN, "name": "impossible"})


def test_a_record_that_breaks_its_own_annotations_is_not_written() -> None:
    with pytest.raises(StructureError, match=r"^Point.x: 'a' is not an integer$"):
        unstructure(Point("a"))  # type: ignore[arg-type]
    with pytest.raises(StructureError, match=r"^Line.ends\[1\]: 3 is not a Point$"):
        unstructure(Line((Point(1), 3)))  # type: ignore[arg-type]


def test_an_annotation_without_a_json_form_is_a_programming_error() -> None:
    @dataclass(frozen=True)
    class Odd:
        things: set[int]

    with pytest.raises(TypeError, match="no annotation that has a JSON form"):
        unstructure(Odd({1}))
