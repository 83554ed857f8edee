"""What a builder has to know of one entry point of a rendered source. Plain data, supplied by the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tilewright.codegen.backends.base import Entry


@dataclass(frozen=True)
class EntrySpec:
    """One ``@triton.jit`` function of a source, and what it is specialised for.

    ``arguments`` are the run-time parameters in order, each with Triton's name of its type: ``*bf16``, ``i32``,
    ``tensordesc<bf16[128, 64]>``. ``divisible_by_16`` names those whose address or value is a multiple of 16: a guard
    of the recipe has to hold each of them. ``constants`` are the parameters that are ``tl.constexpr``.
    """

    entry: str
    arguments: tuple[tuple[str, str], ...]
    divisible_by_16: tuple[str, ...] = ()
    constants: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the compiler: ``maxnreg``, ``num_ctas``, ``waves_per_eu``, ``matrix_instr_nonkdim``, ..."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def triton_entries(entries: Sequence[Entry]) -> tuple[EntrySpec, ...]:
    """``entries`` of a Triton source.

    Raises:
        TypeError: when one is of another language, which is a mistake in a template.

    """
    own = tuple(each for each in entries if isinstance(each, EntrySpec))
    if len(own) < len(entries):
        raise TypeError(f"a Triton source with entries of another language: {entries}")
    return own
