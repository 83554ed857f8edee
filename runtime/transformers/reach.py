"""Tensors that a module can read, as far as one can see from its attributes, its classes and its functions."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

_MOST_OBJECTS = 20_000
"""Looked at; a module from which more is reached is beyond understanding."""
_PLAIN = (str, bytes, int, float, complex, bool, type(None), types.ModuleType)


class TooMuchReachedError(Exception):
    """More is reached than is looked at."""


def reached_tensors(module: nn.Module) -> dict[str, Tensor | np.ndarray[Any, Any]]:
    """Tensors and arrays that ``module`` reaches, by the path to them, each once.

    Seen are parameters, buffers and attributes of the module, its children and classes, what containers and objects
    among these hold, and of functions among these what they close over, their defaults, and the globals that they name.

    Raises:
        TooMuchReachedError: for a module that reaches a whole model, or the like.

    """
    found: dict[str, Tensor | np.ndarray[Any, Any]] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", module)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if len(seen) > _MOST_OBJECTS:
            raise TooMuchReachedError
        if isinstance(value, Tensor | np.ndarray):
            found[path] = value
            continue
        waiting.extend((f"{path}.{name}" if path else name, part) for name, part in _parts(value))
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        for name, attribute in vars(value).items():
            if name in ("_parameters", "_buffers", "_modules"):
                yield from attribute.items()
            elif "hooks" not in name:  # they run around any forward
                yield name, attribute
        for kind in type(value).__mro__:
            if kind is nn.Module:
                break
            yield from vars(kind).items()
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((str(at), part) for at, part in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType | staticmethod | classmethod):
        yield "function", value.__func__
        yield "self", getattr(value, "__self__", None)
    elif isinstance(value, functools.partial):
        yield from (("function", value.func), ("arguments", value.args), ("keywords", value.keywords))
    elif isinstance(value, property):
        yield "get", value.fget
    elif not isinstance(value, type) and hasattr(value, "__dict__") and not type(value).__module__.startswith("torch"):
        yield from vars(value).items()


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    yield "defaults", function.__defaults__
    yield "keyword defaults", function.__kwdefaults__
    for name in function.__code__.co_names:
        named = function.__globals__.get(name)
        its_own = isinstance(named, types.FunctionType) and named.__globals__ is function.__globals__
        if its_own or isinstance(named, Tensor | np.ndarray | list | tuple | dict):
            yield name, named
