"""How predictions are held against what was measured of the same kernels."""

import pytest

from tilewright.tuner.prediction.quality import quality


@pytest.mark.parametrize(
    ("predicted", "measured", "regret", "rank"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 0.0, 1.0),
        ([1, 2, 3, 4], [40, 30, 20, 10], 3.0, -1.0),
        ([2, 1, 3], [10, 15, 20], 0.5, 0.5),
        ([1, 1, 2, 2], [10, 10, 30, 30], 0.0, 1.0),
        ([1, 2], [10, 20], 0.0, None),
        ([1, 1, 1], [10, 20, 30], 0.0, None),
    ],
    ids=["the same order", "the opposite", "the second first", "ties", "too few for an order", "nothing told apart"],
)
def test_regret_and_rank_correlation(
    predicted: list[float], measured: list[float], regret: float, rank: float | None
) -> None:
    found = quality(64, predicted, measured)
    assert (found.size, found.kernels) == (64, len(predicted))
    assert found.regret == pytest.approx(regret)
    assert found.rank_correlation == (None if rank is None else pytest.approx(rank))
