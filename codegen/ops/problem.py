"""A problem of an op: a signature with its dynamic sizes and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from tilewright.codegen.ops.fields import check, json_of, parts, require_names
from tilewright.codegen.ops.signature import Signature, stable_key

MAX_SIZE = 1 << 20
"""Largest dynamic size of a problem: tokens, rows, or tokens of a sequence."""


@dataclass(frozen=True)
class Problem:
    """A signature with its dynamic sizes and data. Subclassed by every op."""

    signature: Signature
    size_field: ClassVar[str] = "tokens"
    """Name of the field that plans pick a kernel by."""
    given: ClassVar[Mapping[str, int]] = {"tokens": 1}
    """Fields that ``--problem`` takes beside the signature's, with their values where it does not name them."""

    def __post_init__(self) -> None:
        check(self, self.signature.op)
        self.require_possible()

    def require_possible(self) -> None:
        """Refuse fields that do not go together; each by itself is possible.

        Raises:
            TilewrightError: names the field.

        """

    @property
    def size(self) -> int:
        """The size by which plans pick a kernel."""
        return int(getattr(self, self.size_field))

    def with_size(self, size: int) -> Self:
        """The same problem with another dynamic size.

        Raises:
            TilewrightError: for an impossible size.

        """
        changes: dict[str, Any] = {self.size_field: size}
        return replace(self, **changes)

    @property
    def output_sizes(self) -> Mapping[str, int]:
        """Sizes by name that no input shows: lengths of outputs that hold as much as the data may need."""
        return {}

    @property
    def assumes(self) -> str:
        """What beside the dynamic size its time depends on, in words; empty where there is nothing to say."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
        own = {name: getattr(self, name) for name in parts(type(self))}
        nested = {name: part.to_dict() if isinstance(part, Signature) else str(part) for name, part in own.items()}
        return {**nested, **json_of(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Problem from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        kinds = parts(cls)
        names = [each.name for each in fields(cls)]
        require_names(values, names, names, f"{kinds['signature'].op} problem")
        nested = {
            name: (kind.from_dict if issubclass(kind, Signature) else kind.parse)(values[name])
            for name, kind in kinds.items()
        }
        return cls(**{**values, **nested})

    @property
    def title(self) -> str:
        """Short name for progress lines."""
        return f"{self.signature.title} {self.signature.size_name}={self.size:<5d}"

    @property
    def key(self) -> str:
        """Identity of the problem, under which its trials are stored."""
        return stable_key(self.to_dict())
