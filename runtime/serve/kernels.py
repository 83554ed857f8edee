"""A stored kernel in this process, ready to be bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.model import Recipe
from tilewright.tuning_db.records import KernelRecord

AnyLayout = WeightLayout | RowLayout


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A kernel that this process can call."""

    record: KernelRecord
    recipe: Recipe
    layout: AnyLayout | None
    """In which it takes its weight; None: as the op declares it."""
    entries: tuple[Any, ...]
    """What is called for each launch of the recipe; the serving device that loaded it knows what that is."""
    owner: object
    """Keeps the loaded code alive."""
