"""Is a result right? Judged in the parent, on memory that no kernel's process can change behind its back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Arrays

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """``error`` is max |out - reference| / max |reference|, infinite where out is not finite."""

    error: float
    complaint: str | None
    """Where it is worst and what was expected; None when it is right."""


def compare_all(outputs: Arrays, reference: Arrays, tolerance: float) -> Comparison:
    """Compare every output of a kernel with the reference's of the same name; the first that is wrong is named."""
    comparisons = [compare(out, reference[name], tolerance, name) for name, out in outputs.items()]
    wrong = [comparison for comparison in comparisons if comparison.complaint]
    return wrong[0] if wrong else Comparison(max(comparison.error for comparison in comparisons), None)


def compare(out: NDArray[Any], reference: NDArray[Any], tolerance: float, name: str = "out") -> Comparison:
    """Compare one output with its reference: floats within ``tolerance``, integers exactly.

    A reference that is zero everywhere is compared absolutely; an empty output is right.
    """
    if out.dtype.kind in "iu":
        return _compare_exactly(out, reference, name)
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
        f"{name}{index} {got}, expected {expected[position]:.7g} (relative error {error:.2g}, allowed {tolerance:.2g})",
    )


def _compare_exactly(out: NDArray[Any], reference: NDArray[Any], name: str) -> Comparison:
    """The error of a wrong integer is infinite: indices are not nearly right."""
    wrong = np.argwhere(out != reference)
    if not len(wrong):
        return Comparison(0.0, None)
    index = tuple(int(i) for i in wrong[0])
    got = "was never written" if _is_poison(out[index]) else f"is {out[index]}"
    return Comparison(np.inf, f"{name}{list(index)} {got}, expected {reference[index]}")


@dataclass(frozen=True)
class PrecisionError:
    """What a precision of the weights does to an op's output: of the precision, not of any kernel."""

    relative: float
    """``||out - reference|| / ||reference||`` (Frobenius): what ``--max-error`` bounds."""
    largest: float
    """``max |out - reference| / max |reference|``."""


def compare_precisions(outputs: Arrays, reference: Arrays) -> PrecisionError:
    """``outputs``, computed exactly from rounded weights, against the reference's; the worst of several outputs."""
    relative = largest = 0.0
    for name, out in outputs.items():
        exact = reference[name]
        if out.size and out is not exact:
            difference = out - exact
            norm, scale = float(np.linalg.norm(exact)) or 1.0, _largest(exact.reshape(-1)) or 1.0
            relative = max(relative, float(np.linalg.norm(difference)) / norm)
            largest = max(largest, _largest(difference.reshape(-1)) / scale)
    return PrecisionError(relative, largest)


def _largest(values: NDArray[np.float64]) -> float:
    return max((float(np.abs(values[i : i + _CHUNK]).max()) for i in range(0, values.size, _CHUNK)), default=0.0)


def _is_poison(value: np.generic) -> bool:
    """Whether all bits are set, as the worker leaves memory before a call."""
    return value.tobytes() == b"\xff" * value.nbytes
