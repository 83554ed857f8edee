"""The base of every op's signature, and the identity of plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

from tilewright.codegen.ops.fields import check, described, fill_in, json_of, read, require_names
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.errors import TilewrightError


def stable_key(fields: Mapping[str, Any]) -> str:
    """Short identity of JSON-able fields: equal fields, equal key, on any machine."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Signature:
    """Static part of a problem, that a kernel is compiled for. Subclassed by every op.

    A subclass describes each field once, in its annotation (:mod:`tilewright.codegen.ops.fields`), and says in
    :meth:`usual` and :meth:`require_possible` what concerns several of them.

    Raises:
        TilewrightError: when a field is impossible; the sentence names it.

    """

    op: ClassVar[str]
    example: ClassVar[str]
    """A text for ``--problem``, for messages."""
    assumed: ClassVar[Mapping[str, str]] = {}
    """Texts of fields without a default that ``--problem`` may leave out."""

    def __post_init__(self) -> None:
        fill_in(self, {})
        fill_in(self, self.usual())
        check(self, self.op)
        self.require_possible()

    def usual(self) -> Mapping[str, Any]:
        """Fields that stand for something usual, with what that is; called before anything is checked."""
        return {}

    def require_possible(self) -> None:
        """Refuse fields that do not go together; each by itself is possible.

        Raises:
            TilewrightError: names the field.

        """

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors of a call, in the order in which callers pass them."""
        raise NotImplementedError

    @property
    def size_name(self) -> str:
        """Name of the size by which plans pick a kernel."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The op and what of it, in a word or two: begins messages and lines of progress."""
        return self.op

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON, the op's name among them."""
        return {"op": self.op, **json_of(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Signature from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        if not isinstance(values, Mapping):
            raise TilewrightError(f"the {cls.op} signature is a {type(values).__name__}; expected an object")
        known = described(cls)
        required = [each.name for each in known.values() if each.default is MISSING]
        own = {name: value for name, value in values.items() if name != "op"}
        require_names(own, known, required, f"{cls.op} signature")
        return cls(**own)

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> Self:
        """Signature from ``key=value`` texts.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        given = {**cls.assumed, **texts}
        known = described(cls)
        if unknown := sorted(given.keys() - known.keys()):
            raise TilewrightError(f"{cls.op} has no field {unknown[0]!r}; its fields are {', '.join(known)}")
        if missing := [each.name for each in known.values() if each.default is MISSING and each.name not in given]:
            raise TilewrightError(f"--problem lacks {', '.join(missing)}; give for example {cls.example}")
        return cls(**read(cls, given))

    @property
    def key(self) -> str:
        """Identity of the signature, in the database and in plans."""
        return stable_key(self.to_dict())

    def describe(self) -> str:
        """One line for people."""
        return " ".join([self.op, *(f"{name}={value}" for name, value in self.to_dict().items() if name != "op")])
