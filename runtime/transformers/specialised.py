"""Modules that get a faster forward and stay what they are: parameters, class name and ancestors are the same.

Classes differ in what they compute, whatever their names say, so that recognition is by trial: the new forward has to
give what the old one gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Relative error within which two forwards compute the same: orders of sums differ."""


class Specialised:
    """Mixed in before a module's class, whose own forward serves whatever the new one does not."""


_MADE: dict[tuple[type, type], type] = {}
"""Classes made, by what is mixed in and the class before: one module after the other needs the same."""


def specialise(module: nn.Module, mixin: type[Specialised]) -> None:
    """Have ``mixin`` serve ``module``."""
    before = type(module)
    name, own = before.__name__, {"__module__": before.__module__}
    module.__class__ = _MADE.setdefault((mixin, before), type(name, (mixin, before), own))


def restore(module: nn.Module) -> None:
    """Undo :func:`specialise`."""
    if isinstance(module, Specialised):
        _, module.__class__ = type(module).__bases__


def agree(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two results have the same shapes, types and, up to rounding, values; NaN and infinities are values."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return False
        if not ours.is_floating_point():
            return torch.equal(ours, theirs)
        ours, theirs = ours.double(), theirs.double()
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        off = torch.where(same, 0.0, ours - theirs).norm()
        return bool(off <= tolerance * torch.where(theirs.isfinite(), theirs, 0.0).norm())
    return (
        isinstance(ours, tuple)
        and isinstance(theirs, tuple)
        and len(ours) == len(theirs)
        and all(agree(*pair, tolerance) for pair in zip(ours, theirs, strict=True))
    )


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    """fp32 input to try a forward on, the same every time; leaves torch's random state as it was."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has put another forward into ``module`` itself, which then counts and not that of its class."""
    return "forward" in vars(module)
