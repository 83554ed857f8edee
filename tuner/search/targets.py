"""What the surrogate is fitted to: log times, with slow configs compressed and failures as bad as the slowest."""

import math
from collections.abc import Sequence

import numpy as np

from tilewright.tuner.search.features import FloatArray

SLOW_QUANTILE = 0.75
"""Times slower than this quantile are compressed: how bad a bad config is says little about the best one."""

SLOW_SLOPE = 0.25
"""How much of a slow config's excess (in log time) is kept, at first; less the further out."""


def logs_or_nan(values: Sequence[float | None]) -> FloatArray:
    """Logs of times in us, float64 [n]; nan for a failure (None).

    Values that are no times have no logs: where one is not positive, all stay as they are, and where all are negative
    (something positive that is maximised), their logs are negated.
    """
    array = np.array([math.nan if value is None else value for value in values])
    known = array[np.isfinite(array)]
    if (known > 0).all():
        array = np.log(array)
    elif (known < 0).all():
        array = -np.log(-array)
    return array


def compressed(log_times: Sequence[float] | FloatArray) -> FloatArray:
    """Compress the slow ones of log times, and set failures (nan) to the slowest; at least one is no failure."""
    logs = np.array(log_times)
    known = np.isfinite(logs)
    slow = np.quantile(logs[known], SLOW_QUANTILE)
    excess = np.maximum(logs - slow, 0.0, where=known, out=np.zeros_like(logs))
    result: FloatArray = np.minimum(logs, slow) + SLOW_SLOPE * np.log1p(excess)
    result[~known] = result[known].max()
    return result
