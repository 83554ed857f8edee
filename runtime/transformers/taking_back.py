"""A whole forward compared with the one before, and what makes it differ taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.transformers.specialised import agree
from tilewright.runtime.transformers.trial import Call, Recording, Trial, tensors_in

_TOLERANCE = 1e-4
"""Relative error of a forward in fp32 whose sums are in another order."""
_TOLERANCE_ROUNDED = 0.5
"""The same where weights are rounded or sums are in bf16, and a token may take another expert. Each part by itself
agreed much closer before; this is for what parts do to each other."""


@dataclass(frozen=True, eq=False)
class Part:
    """Something that is served, and can be taken back."""

    name: str
    """Of its module."""
    what: str
    take_back: Callable[[], None]


def take_back_what_differs(
    model: Any, trial: Trial, before: Recording, parts: Sequence[Part], *, exact: bool
) -> list[tuple[Part, str]]:
    """Run ``trial`` until it gives what it gave ``before``, taking back those of ``parts`` that it differs by.

    Args:
        model: in which ``parts`` are served.
        trial: what is run.
        before: what it gave.
        parts: what may be taken back.
        exact: whether nothing but the order of sums may differ.

    Returns:
        What was taken back, and why.

    """
    left, taken = list(parts), []
    while left:
        after = trial.record(model)
        where = _first_difference(before, after, {part.name for part in left if part.what == "router"}, exact=exact)
        if where is None:
            break
        happened = "gave something else" if after.error is None else f"raised {type(after.error).__name__}"
        culprits = _served_at(where, left)
        for part in culprits:
            part.take_back()
            taken.append((part, f"with its {part.what} served, a whole forward {happened}"))
        left = [part for part in left if part not in culprits]
    return taken


def _first_difference(before: Recording, after: Recording, routers: set[str], *, exact: bool) -> str | None:
    """The innermost module that gave something else, or in which an exception was raised; None where none did."""
    if before.error is not None:
        return None
    tolerance = _TOLERANCE if exact else _TOLERANCE_ROUNDED
    if not exact and after.error is None and _same(after.calls[""][-1], before.calls[""][-1], tolerance):
        return None
    for name, at in after.ended:
        known = before.calls.get(name, [])
        # A router that is served was compared by itself; its choices may come in another order.
        if name not in routers and (at >= len(known) or not _same(after.calls[name][at], known[at], tolerance)):
            return name
    if after.error is not None:
        return after.begun[-1] if after.begun else ""
    return None


def _same(ours: Call, theirs: Call, tolerance: float) -> bool:
    pairs = list(tensors_in(ours.output)), list(tensors_in(theirs.output))
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(
        agree(mine, other, tolerance)
        for mine, other in zip(*pairs, strict=True)
        if other.is_floating_point() or mine.dtype != other.dtype
    )


def _served_at(name: str, parts: Sequence[Part]) -> list[Part]:
    """The parts in the module ``name``, or in the nearest one around it that has any; all if none has."""
    for around in _outwards(name):
        inside = [part for part in parts if part.name == around or part.name.startswith(f"{around}." if around else "")]
        if inside:
            return inside
    return list(parts)


def _outwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
