"""Few samples that still try every pair of choices together: most faults of a template show with two of its knobs."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_CANDIDATES = 64


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
