"""What parent and worker agree on: guards around buffers, and launches whose addresses the worker knows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tilewright.codegen.recipe.resolve import ResolvedArgument, ResolvedLaunch

GUARD_BYTES: Final = 4 << 10
"""Before and behind every buffer, which a kernel must leave as they are; the data begin at a multiple of 256."""
GUARD: Final = 0xA5
POISON: Final = 0xFF
"""Fills outputs before a call: a NaN in every floating-point type, and one that no arithmetic makes."""


def placed(launch: ResolvedLaunch, address_of: Callable[[str], int]) -> ResolvedLaunch:
    """``launch`` with the addresses of the buffers that its arguments name."""

    def place(argument: ResolvedArgument) -> ResolvedArgument:
        return replace(argument, value=address_of(argument.buffer) + argument.offset) if argument.buffer else argument

    return replace(launch, arguments=tuple(map(place, launch.arguments)))
