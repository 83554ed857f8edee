"""The fitted constants that predictions use, and how far off they were.

From ``python -m benchmarks.fit_prediction A100 H100`` on PyTorch AutoHeuristic's timed candidates of 16-bit GEMM (350
problems of each device at the most).
"""

from tilewright.tuner.prediction.constants import Constants

FITTED = Constants(
    launch_us=7.34,
    matrix_share=1.0,
    feed=9.58,
    dram_share=0.783,
    l2_ratio=3.35,
    step_us=0.643,
    first_stage=1.0,
    overlap=2.57,
    wave_us=0.399,
    register_pressure=0.232,
    narrow_share=0.338,
    scalar_share=0.5,
)
FACTOR_LOW = 0.64
FACTOR_HIGH = 1.87
"""Measured over predicted time: 5th and 95th percentile on a device that was not fitted on; the wider of A100 from
H100's constants and H100 from A100's."""
