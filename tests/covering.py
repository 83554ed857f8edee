"""Few samples that still try every value, or every pair of values: most faults of a template show with two knobs.

``TILEWRIGHT_FULL=1`` asks for every pair, in all tests that draw samples here.
"""

import os
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

FULL = os.environ.get("TILEWRIGHT_FULL") == "1"
"""Whether tests try all that they know of, which takes hours, and not a part of it, which takes minutes."""

_CANDIDATES = 64


def sample_rows(codes: NDArray[np.int64], seed: int) -> list[int]:
    """Rows of ``codes`` [configs, knobs] that tests try: every pair with :data:`FULL`, otherwise every value twice."""
    if FULL:
        return covering_rows(codes, seed)
    return list(dict.fromkeys([*covering_values(codes, seed), *covering_values(codes, seed + 1)]))


def covering_values(codes: NDArray[np.int64], seed: int, most: int | None = None) -> list[int]:
    """Rows of ``codes`` [configs, knobs] that together hold every value of every knob; ``most`` of them, if given.

    Greedy as :func:`covering_rows`, which takes seconds where this takes milliseconds.
    """
    offsets = np.concatenate(([0], np.cumsum(codes.max(axis=0) + 1)[:-1]))
    numbers = codes + offsets
    missing = np.zeros(numbers.max() + 1, bool)
    missing[np.unique(numbers)] = True
    chosen: list[int] = []
    random = np.random.default_rng(seed)
    while missing.any() and (most is None or len(chosen) < most):
        first = random.choice(np.flatnonzero(missing))
        column = np.searchsorted(offsets, first, side="right") - 1
        candidates = random.permutation(np.flatnonzero(numbers[:, column] == first))[:_CANDIDATES]
        best = int(candidates[missing[numbers[candidates]].sum(axis=1).argmax()])
        missing[numbers[best]] = False
        chosen.append(best)
    return chosen


def covering_rows(codes: NDArray[np.int64], seed: int) -> list[int]:
    """Rows of ``codes`` [configs, knobs] that together hold every pair of values which any row holds.

    Greedy: the next row holds the first missing pair, and of some such rows it is the one that brings most new pairs.
    """
    pairs = list(combinations(range(codes.shape[1]), 2))
    numbers = np.empty((len(codes), len(pairs)), np.int64)
    starts = np.zeros(len(pairs) + 1, np.int64)
    for column, (left, right) in enumerate(pairs):
        width = int(codes[:, right].max()) + 1
        numbers[:, column] = starts[column] + codes[:, left] * width + codes[:, right]
        starts[column + 1] = numbers[:, column].max() + 1
    missing = np.zeros(starts[-1], bool)
    missing[numbers] = True
    chosen = []
    random = np.random.default_rng(seed)
    while missing.any():
        first = missing.argmax()
        column = np.searchsorted(starts, first, side="right") - 1
        candidates = random.permutation(np.flatnonzero(numbers[:, column] == first))[:_CANDIDATES]
        best = int(candidates[missing[numbers[candidates]].sum(axis=1).argmax()])
        missing[numbers[best]] = False
        chosen.append(best)
    return chosen
