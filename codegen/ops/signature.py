"""The base of every op's signature, and the identity of plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tilewright.codegen.recipe.model import TensorSpec


def stable_key(fields: Mapping[str, Any]) -> str:
    """Short identity of JSON-able fields: equal fields, equal key, on any machine."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Signature:
    """Static part of a problem, that a kernel is compiled for. Subclassed by every op."""

    op: ClassVar[str]

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
        return {"op": self.op, **asdict(self)}

    @property
    def key(self) -> str:
        """Identity of the signature, in the database and in plans."""
        return stable_key(self.to_dict())

    def describe(self) -> str:
        """One line for people."""
        return " ".join([self.op, *(f"{name}={value}" for name, value in self.to_dict().items() if name != "op")])
