"""Is a result right? Judged in the parent, on memory that no kernel's process can change behind its back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """``error`` is max |out - reference| / max |reference|, infinite where out is not finite."""

    error: float
    complaint: str | None
    """Where it is worst and what was expected; None when it is right."""


def compare(out: NDArray[Any], reference: NDArray[np.float64], tolerance: float) -> Comparison:
    """Compare a kernel's output with the reference.

    A reference that is zero everywhere is compared absolutely; an empty output is right.
    """
    flat, expected = out.reshape(-1), reference.reshape(-1)
    scale = _largest(expected) or 1.0
    worst, position = 0.0, 0
    # In chunks, so that no temporary in float64 is as large as the output.
    for start in range(0, flat.size, _CHUNK):
        with np.errstate(invalid="ignore", over="ignore"):
            errors = np.abs(flat[start : start + _CHUNK] - expected[start : start + _CHUNK])
        errors[~np.isfinite(errors)] = np.inf
        chunk_position = int(np.argmax(errors))
        if errors[chunk_position] > worst:
            worst, position = float(errors[chunk_position]), start + chunk_position
    error = worst / scale
    if error <= tolerance:
        return Comparison(error, None)
    index = [int(i) for i in np.unravel_index(position, reference.shape)]
    got = "was never written" if _is_poison(flat[position]) else f"is {flat[position]:.7g}"
    return Comparison(
        error,
        f"out{index} {got}, expected {expected[position]:.7g} (relative error {error:.2g}, allowed {tolerance:.2g})",
    )


@dataclass(frozen=True)
class PrecisionError:
    """What a precision of the weights does to an op's output: of the precision, not of any kernel."""

    relative: float
    """``||out - reference|| / ||reference||`` (Frobenius): what ``--max-error`` bounds."""
    largest: float
    """``max |out - reference| / max |reference|``."""


def compare_precisions(out: NDArray[np.float64], reference: NDArray[np.float64]) -> PrecisionError:
    """``out``, computed exactly from rounded weights, against the reference with the weights as declared."""
    if out.size == 0 or out is reference:
        return PrecisionError(0.0, 0.0)
    norm, scale = float(np.linalg.norm(reference)) or 1.0, _largest(reference.reshape(-1)) or 1.0
    difference = out - reference
    return PrecisionError(float(np.linalg.norm(difference)) / norm, _largest(difference.reshape(-1)) / scale)


def _largest(values: NDArray[np.float64]) -> float:
    return max((float(np.abs(values[i : i + _CHUNK]).max()) for i in range(0, values.size, _CHUNK)), default=0.0)


def _is_poison(value: np.generic) -> bool:
    """Whether all bits are set, as the worker leaves memory before a call."""
    return value.tobytes() == b"\xff" * value.nbytes
