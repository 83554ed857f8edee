"""Frozen dataclasses to JSON values and back, derived from their annotations with the standard library alone.

``unstructure`` turns tuples into lists, enums into their values and nested dataclasses into objects; ``structure`` is
its inverse. Both are strict: an object has exactly the fields of its dataclass, an ``int`` is no bool and no float, a
Literal is one of its values. Annotations may be ``int``, ``float``, ``str``, ``bool``, ``bytes``, ``None``, ``Any``,
``dict[str, Any]`` (a document, taken as it is), Literals, enums, dataclasses, and tuples and unions of these.
"""

import dataclasses
import numbers
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from itertools import repeat
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class StructureError(ValueError):
    """A value does not fit a dataclass; the message names the place (``Recipe.guards[0].multiple``) and the value."""

    def __init__(self, problem: str, place: str = "", wanted: str = "") -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.problem, self.place, self.wanted = problem, place, wanted

    def within(self, place: str) -> "StructureError":
        """Return the same error, seen from the value that holds this one at ``place``."""
        return StructureError(self.problem, place + self.place, self.wanted)


def structure(cls: type[T], data: Mapping[str, Any]) -> T:
    """Make a ``cls``, a dataclass, of its JSON object. Raises StructureError, or what its ``__post_init__`` raises."""
    made: T = _named(cls, "load", data)
    return made


def unstructure(record: Any) -> dict[str, Any]:
    """Make the JSON object of a dataclass instance; numpy's numbers become Python's. Raises StructureError."""
    found: dict[str, Any] = _named(type(record), "dump", record)
    return found


@cache
def fields_of(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields by name, evaluated."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


_Convert = Callable[[Any], Any]


@dataclass(frozen=True)
class _Converter:
    load: _Convert
    dump: _Convert


@cache
def _converter(hint: Any) -> _Converter:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _Converter(_same, _same)
    if origin is Literal:
        return _both(partial(_one_of, arguments))
    if origin in (Union, types.UnionType):
        return _union([_converter(each) for each in arguments])
    if origin is tuple:
        return _tuple(arguments)
    if origin is dict or hint is dict:
        return _both(_document)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Converter(partial(_member, hint), lambda value: _exactly(hint, f"a {hint.__name__}", value).value)
    if hint in _PLAIN:
        return _both(_PLAIN[hint])
    raise TypeError(f"{hint!r} is no annotation that has a JSON form here")


def _named(cls: Any, way: str, value: Any) -> Any:
    try:
        return getattr(_converter(cls), way)(value)
    except StructureError as error:
        raise error.within(cls.__name__) from None


def _dataclass(cls: Any) -> _Converter:
    fields = {name: _converter(hint) for name, hint in fields_of(cls).items()}
    loads, dumps = ({name: getattr(each, way) for name, each in fields.items()} for way in ("load", "dump"))

    def load(data: Any) -> Any:
        if not isinstance(data, Mapping):
            _refuse(data, "an object")
        if missing := fields.keys() - data.keys():
            raise StructureError(f"the field {min(missing)!r} is missing")
        if unknown := data.keys() - fields.keys():
            raise StructureError(f"there is no field {min(map(str, unknown))!r}")
        return cls(**_converted(loads, data))

    def dump(record: Any) -> Any:
        _exactly(cls, f"a {cls.__name__}", record)
        return _converted(dumps, {name: getattr(record, name) for name in fields})

    return _Converter(load, dump)


def _converted(converts: Mapping[str, _Convert], values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    name = ""
    try:
        for name, convert in converts.items():
            found[name] = convert(values[name])
    except StructureError as error:
        raise error.within(f".{name}") from None
    return found


def _tuple(arguments: tuple[Any, ...]) -> _Converter:
    endless = len(arguments) == 2 and arguments[1] is Ellipsis
    items = [_converter(each) for each in arguments if each is not Ellipsis]

    def through(converts: Sequence[_Convert], value: Any) -> list[Any]:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            _refuse(value, "a list")
        if not endless and len(value) != len(converts):
            _refuse(value, f"a list of {len(converts)}")
        found: list[Any] = []
        try:
            for convert, each in zip(repeat(converts[0]) if endless else converts, value, strict=False):
                found.append(convert(each))
        except StructureError as error:
            raise error.within(f"[{len(found)}]") from None
        return found

    loads, dumps = [each.load for each in items], [each.dump for each in items]
    return _Converter(lambda value: tuple(through(loads, value)), lambda value: through(dumps, value))


def _union(members: Sequence[_Converter]) -> _Converter:
    def through(value: Any, way: str) -> Any:
        errors = []
        for member in members:
            try:
                return getattr(member, way)(value)
            except StructureError as error:
                errors.append(error)
        # What is wrong inside an object says more than that it is no null.
        if inside := [error for error in errors if error.place or not error.wanted]:
            raise max(inside, key=lambda error: len(error.place))
        _refuse(value, " or ".join(dict.fromkeys(error.wanted for error in errors)))

    return _Converter(lambda value: through(value, "load"), lambda value: through(value, "dump"))


def _both(convert: _Convert) -> _Converter:
    return _Converter(convert, convert)


def _same(value: Any) -> Any:
    return value


def _integer(value: Any) -> int:
    if type(value) is int:  # nearly always, and much faster than asking an abstract class
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        _refuse(value, "an integer")
    return operator.index(value)


def _number(value: Any) -> float:
    if type(value) is float and value == value:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value:
        _refuse(value, "a number")
    try:
        return float(value)
    except OverflowError:
        _refuse(value, "a number of 64 bits")


def _exactly(cls: type, words: str, value: Any) -> Any:
    return value if isinstance(value, cls) else _refuse(value, words)


def _document(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        _refuse(value, "an object")
    found: dict[str, Any] = value
    return found


def _one_of(allowed: tuple[Any, ...], value: Any) -> Any:
    if not any(type(value) is type(each) and value == each for each in allowed):
        _refuse(value, f"one of {', '.join(map(repr, allowed))}")
    return value


def _member(cls: type[Enum], value: Any) -> Enum:
    try:
        return cls(value)
    except ValueError:
        _refuse(value, f"one of {', '.join(repr(each.value) for each in cls)}")


_PLAIN: dict[Any, _Convert] = {
    int: _integer,
    float: _number,
    str: partial(_exactly, str, "a text"),
    bool: partial(_exactly, bool, "true or false"),
    bytes: partial(_exactly, bytes, "bytes"),
    types.NoneType: partial(_exactly, types.NoneType, "null"),
}


def _refuse(value: Any, wanted: str) -> NoReturn:
    text = repr(value)
    raise StructureError(f"{text if len(text) <= 60 else text[:57] + '...'} is not {wanted}", wanted=wanted)
