"""An op in one language: its templates, and where tuning begins for the archs that they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.codegen.space import Value

if TYPE_CHECKING:
    from tilewright.codegen.ops.template import Template

Choice = tuple[str, Mapping[str, Value]]
"""A template's full name, and values of its knobs."""


def _no_starts(signature: Any, arch: Any, precisions: Sequence[str]) -> tuple[Choice, ...]:
    """Nothing is known to have won elsewhere."""
    del signature, arch, precisions
    return ()


@dataclass(frozen=True)
class Implementation:
    """What an op's folder for one language declares.

    Several may be for one arch: their templates compete in one space, and the first that has a :attr:`default` says
    where tuning begins.
    """

    templates: tuple[Template[Any], ...]
    default: Callable[[Any, Any, int | None], Choice] | None = None
    """``default(signature, arch, size)``: what a careful engineer would write down without tuning, by the dynamic size
    where practice chooses by it (None: for many), in one weight layout for all sizes. None: another language says it.
    """
    starting_configs: Callable[[Any, Any, Sequence[str]], tuple[Choice, ...]] = _no_starts
    """``starting_configs(signature, arch, precisions)``: see :meth:`OpDeclaration.starting_configs`. Each has to be in
    its template's space: one that does not apply to a signature is left out by a condition that says why."""
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Dynamic sizes to tune where neither the user nor the op names any."""
