"""Configs as points: the axes along which the surrogate measures how alike two configs are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.codegen.space import Space
from tilewright.tuner.search.encoding import WIDE_RANGE

FloatArray = npt.NDArray[np.float64]

SAME_AXIS = 0.98
"""Correlation from which on alignment says nothing that size did not say already."""

ABSENT = 0.5
"""Where a config lies on the axis of a knob that its template does not have: neither small nor large."""


@dataclass(frozen=True)
class Features:
    """Points of a space: `points` is float64 [configs, columns], `groups` int [columns].

    Columns of one group share a lengthscale: they are one way of looking at one parameter.
    """

    points: FloatArray
    groups: npt.NDArray[np.intp]

    @property
    def group_count(self) -> int:
        """How many lengthscales there are."""
        return int(self.groups[-1]) + 1 if len(self.groups) else 0


def features_of(space: Space) -> Features:
    """Give every parameter that varies its axes.

    A number lies on an axis from 0 to 1 and, when that says more, on a second one by the largest power of two that
    divides it (48 is like 16 there: what decides vector width and bank conflicts). Two values of any other kind are
    the ends of an axis; more are all equally far apart.
    """
    columns: list[FloatArray] = []
    groups: list[int] = []
    for parameter, index in zip(space.parameters, space.indices.T, strict=True):
        for axes in _axes(parameter.values):
            group = groups[-1] + 1 if groups else 0
            columns += [axis[index] for axis in axes]
            groups += [group] * len(axes)
    points = np.stack(columns, axis=1) if columns else np.zeros((len(space), 0))
    return Features(points, np.array(groups, dtype=np.intp))


def _axes(values: Sequence[Any]) -> list[list[FloatArray]]:
    """Return groups of axes; each axis says where each value lies."""
    present = [i for i, value in enumerate(values) if value is not None]
    if len(present) < 2:
        # A knob with one value beside None only says which template it is, and that has its own parameter.
        return []
    known = [values[i] for i in present]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in known):
        if len(known) == 2:
            return [[_spread(np.array([0.0, 1.0]), present, len(values))]]
        return [[_spread(one_hot, present, len(values), absent=0.0) for one_hot in np.eye(len(known)) / math.sqrt(2)]]
    numbers = np.array(known, dtype=float)
    size = np.log2(numbers) if numbers.min() > 0 and numbers.max() / numbers.min() >= WIDE_RANGE else numbers
    groups = [[_spread(_unit(size), present, len(values))]]
    alignment = _alignment(numbers)
    if alignment is not None:
        groups.append([_spread(_unit(alignment), present, len(values))])
    return groups


def _alignment(numbers: FloatArray) -> FloatArray | None:
    """Log2 of the largest power of two that divides each number; None where that is nothing new."""
    if len(numbers) < 3 or numbers.min() <= 0 or any(not float(n).is_integer() for n in numbers):
        return None
    alignment = np.array([math.log2(int(n) & -int(n)) for n in numbers])
    if alignment.max() == alignment.min() or abs(np.corrcoef(alignment, np.log2(numbers))[0, 1]) > SAME_AXIS:
        return None
    return alignment


def _unit(axis: FloatArray) -> FloatArray:
    low, high = float(axis.min()), float(axis.max())
    return (axis - low) / (high - low)


def _spread(axis: FloatArray, present: Sequence[int], count: int, absent: float = ABSENT) -> FloatArray:
    """Lay the axis of the present values out over all values."""
    result = np.full(count, absent)
    result[list(present)] = axis
    return result
