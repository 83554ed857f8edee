"""What the surrogate is fitted to: log times, with slow configs compressed and failures as bad as the slowest."""

import math
from collections.abc import Sequence

import numpy as np

from tilewright.tuner.search.features import FloatArray

SLOW_QUANTILE = 0.75
"""Times slower than this quantile are compressed: how bad a bad config is says little about the best one."""

SLOW_SLOPE = 0.25
"""How much of a slow config's excess (in log time) is kept, at first; less the further out."""


def log_or_nan(time_us: float | None) -> float:
    """Log of a time in us; nan for a failure."""
    return math.nan if time_us is None else math.log(time_us)


def compressed(log_times: Sequence[float]) -> FloatArray:
    """Compress the slow ones of log times, and set failures (nan) to the slowest; at least one is no failure."""
    logs = np.array(log_times)
    known = np.isfinite(logs)
    slow = np.quantile(logs[known], SLOW_QUANTILE)
    excess = np.maximum(logs - slow, 0.0, where=known, out=np.zeros_like(logs))
    result: FloatArray = np.minimum(logs, slow) + SLOW_SLOPE * np.log1p(excess)
    result[~known] = result[known].max()
    return result
