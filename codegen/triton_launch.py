"""How a Triton template's entries are launched, said once: what the builder and the recipe need is derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilewright.codegen.building.entry import EntrySpec
from tilewright.codegen.expressions import IntExpr
from tilewright.codegen.recipe import Argument, Guard, Launch

HIDDEN_ARGUMENTS = 2
"""Null pointers that Triton appends to every entry's parameters: global and profile scratch."""

_ALIGNMENT = 16
_WORKSPACE_ALIGNMENT = 256


@dataclass(frozen=True)
class EntryParameter:
    """One run-time parameter of an entry: Triton's name of its type, and what is passed."""

    name: str
    type: str
    argument: Argument
    aligned: bool = False
    """Whether the kernel is compiled for an address that is a multiple of 16 bytes; becomes a guard."""


@dataclass(frozen=True)
class EntryLaunch:
    """One launch of one entry. ``grid`` holds :class:`IntExpr` texts; a grid of no blocks is not launched."""

    entry: str
    parameters: tuple[EntryParameter, ...]
    grid: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> EntrySpec:
        """For the builder."""
        return EntrySpec(
            self.entry,
            tuple((each.name, each.type) for each in self.parameters),
            divisible_by_16=tuple(each.name for each in self.parameters if each.aligned),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            options=self.options,
        )

    def launch(self, warp_size: int) -> Launch:
        """For the recipe, before anything is built: shared memory and final warps are facts of the binary."""
        return Launch(
            artifact="",
            entry=self.entry,
            arguments=tuple(each.argument for each in self.parameters),
            grid=self.grid,
            block=(str(self.num_warps * warp_size),),
            hidden_arguments=HIDDEN_ARGUMENTS,
        )


def guards(launches: Sequence[EntryLaunch]) -> tuple[Guard, ...]:
    """Every alignment that some entry is compiled for; offsets within workspace and packed weight keep it."""
    named: dict[str, None] = {}
    for launch in launches:
        for each in launch.parameters:
            if each.aligned:
                match each.argument.kind:
                    case "workspace":
                        named["workspace"] = None
                    case "scales":
                        named["weight"] = None
                    case _:
                        named[each.argument.source] = None
    return tuple(Guard(name, _ALIGNMENT) for name in named)


class Workspace:
    """Parts of a workspace one behind the other, each at a multiple of 256 bytes."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, size_bytes: str) -> None:
        """Append a part; ``size_bytes`` is an :class:`IntExpr` text."""
        self._parts[name] = f"ceildiv({size_bytes}, {_WORKSPACE_ALIGNMENT}) * {_WORKSPACE_ALIGNMENT}"

    @property
    def size_bytes(self) -> str:
        """Of all parts, as an :class:`IntExpr` text."""
        return IntExpr(" + ".join(self._parts.values()) or "0").text

    def argument(self, name: str) -> Argument:
        """The address of a part."""
        before = list(self._parts.values())[: list(self._parts).index(name)]
        return Argument("workspace", " + ".join(before))
