"""Dataclasses from JSON, strictly: what is missing, unknown or of another type is refused in one sentence."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tilewright.errors import TilewrightError

_JSON_NAMES = {str: "a text", int: "an integer", bool: "true or false", type(None): "null"}


def read(kind: Any, value: object, where: str) -> Any:
    """``value`` as ``kind``: a dataclass, ``tuple[X, ...]``, a ``Literal``, a union, ``str``, ``int``, ``bool``, None.

    Args:
        kind: type hint of what is wanted; fields of dataclasses that have a default may be missing.
        value: as the JSON reader gives it.
        where: what it is, for messages.

    Raises:
        TilewrightError: when it is something else.

    """
    options = get_args(kind)
    match get_origin(kind):
        case None if is_dataclass(kind):
            return _read_fields(kind, value, where)
        case None if type(value) is kind:  # not isinstance: true is no integer
            return value
        case origin if origin is tuple and isinstance(value, list | tuple):
            return tuple(read(options[0], each, f"{where}[{index}]") for index, each in enumerate(value))
        case origin if origin is Literal and isinstance(value, str) and value in options:
            return value
        case origin if origin in (Union, types.UnionType):
            chosen = next((option for option in options if _could_be(option, value)), None)
            if chosen is not None:
                return read(chosen, value, where)
    raise TilewrightError(f"{where} is {_shown(value)}; expected {_described(kind)}")


def _read_fields(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise TilewrightError(f"{where} is {_shown(value)}; expected an object")
    known = {field.name: field for field in fields(kind)}
    if unknown := [name for name in value if name not in known]:
        raise TilewrightError(f"{where} has the field {unknown[0]!r}, which this tilewright does not know")
    needed = (name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING)
    if missing := [name for name in needed if name not in value]:
        raise TilewrightError(f"{where} lacks the field {missing[0]!r}")
    hints = _hints(kind)
    return kind(**{name: read(hints[name], each, f"{where}.{name}") for name, each in value.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _could_be(kind: Any, value: object) -> bool:
    if is_dataclass(kind):
        return isinstance(value, Mapping) and set(value) <= {field.name for field in fields(kind)}
    return type(value) is kind


def _described(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is tuple:
        return "a list"
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is None:
        return "an object" if is_dataclass(kind) else _JSON_NAMES[kind]
    return " or ".join(map(_described, get_args(kind)))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
