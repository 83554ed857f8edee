"""Meaning and possible values of a field, said once: reading, refusals, JSON and help derive from it.

A field is described in its annotation::

    top_k: Annotated[int, Whole("Experts that a token picks.", 1, "experts")]

Light to import: the runtime makes signatures.
"""

from __future__ import annotations

import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, cast, get_args, get_type_hints

from tilewright.errors import TilewrightError

_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_HELP_COLUMNS = 100


@dataclass(frozen=True)
class FieldSpec(ABC):
    """One field: its meaning in a sentence, and which values are possible."""

    help: str
    like: str = field(default="", kw_only=True)
    """Name of the field whose value this one takes where it has its default."""
    omitted: bool = field(default=False, kw_only=True)
    """Whether JSON leaves it out at its default: it came when signatures had been stored, whose keys stay the same."""

    def read(self, text: str) -> Any:
        """Value of ``text``; the text itself where it is none, which is refused as any other impossible value."""
        return text

    def normal(self, value: Any) -> Any:
        """``value`` as it is kept, so that equal fields have equal JSON."""
        return value

    @abstractmethod
    def allows(self, value: Any, owner: object) -> bool:
        """Whether ``owner`` may have ``value``."""

    @abstractmethod
    def possible(self, owner: object | None = None) -> str:
        """Values that ``owner`` may have, in words; without one, a bound that is another field goes by its name."""


@dataclass(frozen=True)
class Whole(FieldSpec):
    """A whole number; ``most`` may be the name of a field that stands before it."""

    least: int
    most: int | str
    step: int = 1

    def read(self, text: str) -> Any:
        """An int."""
        try:
            return int(text)
        except ValueError:
            return text

    def allows(self, value: Any, owner: object) -> bool:
        """Within the bounds, and a multiple of ``step``."""
        return is_whole(value) and self.least <= value <= self._most(owner) and value % self.step == 0

    def possible(self, owner: object | None = None) -> str:
        """The bounds and the step."""
        most = self.most if owner is None else self._most(owner)
        if self.least == most:
            return str(most)
        kind = "a whole number" if self.step == 1 else f"a multiple of {self.step}"
        return f"{kind} from {self.least} to {most}"

    def _most(self, owner: object) -> int:
        return int(getattr(owner, self.most)) if isinstance(self.most, str) else self.most


@dataclass(frozen=True)
class Positive(FieldSpec):
    """A finite float above 0."""

    def read(self, text: str) -> Any:
        """A float."""
        try:
            return float(text)
        except ValueError:
            return text

    def normal(self, value: Any) -> Any:
        """Whole numbers as floats."""
        return float(value) if is_whole(value) else value

    def allows(self, value: Any, owner: object) -> bool:
        """Whether it is one."""
        del owner
        return isinstance(value, float) and math.isfinite(value) and value > 0

    def possible(self, owner: object | None = None) -> str:
        """In words."""
        del owner
        return "a number above 0"


@dataclass(frozen=True)
class Truth(FieldSpec):
    """True or false."""

    def read(self, text: str) -> Any:
        """``true``, ``1``, ``false`` or ``0``, in small letters or large ones."""
        return _TRUTH.get(text.lower(), text)

    def allows(self, value: Any, owner: object) -> bool:
        """Whether it is a bool."""
        del owner
        return isinstance(value, bool)

    def possible(self, owner: object | None = None) -> str:
        """In words."""
        del owner
        return "true or false"


@dataclass(frozen=True)
class Choice(FieldSpec):
    """One of some words; of a field that is annotated as a Literal, its words."""

    choices: tuple[str, ...] = ()

    def allows(self, value: Any, owner: object) -> bool:
        """Whether it is one of them."""
        del owner
        return value in self.choices

    def possible(self, owner: object | None = None) -> str:
        """All of them."""
        del owner
        return listed([choice for choice in self.choices if choice])


@dataclass(frozen=True)
class Described:
    """A field with its description."""

    name: str
    spec: FieldSpec
    default: Any
    """``dataclasses.MISSING`` where it has to be given."""


_described: dict[type[Any], Mapping[str, Described]] = {}
_parts: dict[type[Any], Mapping[str, type[Any]]] = {}


def described(kind: type[Any]) -> Mapping[str, Described]:
    """Described fields of the dataclass ``kind``, by name, in their order.

    Raises:
        TypeError: for a field that somebody forgot to describe, which would be lost in JSON.

    """
    if kind not in _described:
        _read_annotations(kind)
    return _described[kind]


def parts(kind: type[Any]) -> Mapping[str, type[Any]]:
    """Types of the fields of ``kind`` that are dataclasses themselves and have no description, by name.

    Raises:
        TypeError: for a field that is neither.

    """
    if kind not in _parts:
        _read_annotations(kind)
    return _parts[kind]


def _read_annotations(kind: type[Any]) -> None:
    known, nested = {}, {}
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        hint = hints[each.name]
        spec = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, FieldSpec)), None)
        if isinstance(spec, Choice) and not spec.choices:
            spec = replace(spec, choices=get_args(hint.__origin__))
        if spec is not None:
            known[each.name] = Described(each.name, spec, each.default)
        elif is_dataclass(hint):
            nested[each.name] = cast("type[Any]", hint)
        else:
            raise TypeError(f"{kind.__name__}.{each.name} is not described; annotate it with what it may hold")
    _described[kind], _parts[kind] = known, nested


def fill_in(owner: object, usual: Mapping[str, Any]) -> None:
    """Replace what stands for the usual by what that is, so that equal signatures have equal fields.

    ``usual`` are values by field; a field that is like another takes that one's.
    """
    for each in described(type(owner)).values():
        value = each.spec.normal(getattr(owner, each.name))
        if each.spec.like and value == each.default:
            value = getattr(owner, each.spec.like)
        object.__setattr__(owner, each.name, value)
    for name, value in usual.items():
        object.__setattr__(owner, name, value)


def check(owner: object, what: str) -> None:
    """Refuse the first impossible value of ``owner``, which messages call ``what``.

    Raises:
        TilewrightError: names the field, its value, and what is possible.

    """
    for each in described(type(owner)).values():
        if not each.spec.allows(getattr(owner, each.name), owner):
            raise impossible(owner, what, each.name, each.spec.possible(owner))


def impossible(owner: object, what: str, name: str, possible: str) -> TilewrightError:
    """What to raise for the value of the field ``name``, where ``possible`` is possible."""
    return TilewrightError(f"{what}: {name}={getattr(owner, name)!r} is impossible; give {possible}")


def json_of(owner: object) -> dict[str, Any]:
    """Described fields as JSON."""
    values = {each.name: (getattr(owner, each.name), each) for each in described(type(owner)).values()}
    return {name: value for name, (value, each) in values.items() if not each.spec.omitted or value != each.default}


def require_names(values: Mapping[str, Any], known: Iterable[str], required: Iterable[str], what: str) -> None:
    """Refuse JSON fields that are not known, or are missing from ``values``.

    Raises:
        TilewrightError: names the field.

    """
    article = "an" if what[0] in "aeiou" else "a"
    if unknown := sorted(set(values) - set(known)):
        raise TilewrightError(f"{article} {what} has no field {unknown[0]!r}; this tilewright may be too old")
    if missing := [name for name in required if name not in values]:
        raise TilewrightError(f"{article} {what} lacks the field {missing[0]!r}; it was not written by to_dict")


def read(kind: type[Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Values of ``texts``, which are of described fields of ``kind``."""
    return {name: described(kind)[name].spec.read(text) for name, text in texts.items()}


def help_of(each: Described, default: object = MISSING) -> str:
    """Lines that describe a field; ``default`` in place of its own."""
    value = each.default if default is MISSING else default
    shown = ""
    if each.spec.like:
        shown = f" (default: that of {each.spec.like})"
    elif isinstance(each.spec, Whole) or each.spec.allows(value, None):  # else it stands for what the help says
        shown = "" if value is MISSING else f" (default {str(value).lower() if isinstance(value, bool) else value})"
    text = f"{each.spec.possible()}{shown}. {' '.join(each.spec.help.split())}"
    indent = " " * 16
    return textwrap.fill(f"  {each.name:<13} {text}", _HELP_COLUMNS, subsequent_indent=indent, break_long_words=False)


def listed(words: Sequence[str]) -> str:
    """Words as a choice: ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def is_whole(value: object) -> bool:
    """Whether ``value`` is an int, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)
