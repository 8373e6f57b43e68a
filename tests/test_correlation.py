"""Rank correlation against values computed by hand, and its interval against Fisher's."""

import math

import pytest
import torch

from editkit.errors import EditkitError
from editkit.metrics.correlation import rank_correlation, spearman


def test_rank_correlation_by_hand() -> None:
    # ρ = 1 − 6 Σd² / (n (n² − 1)) without ties: d = 0, 1, −1, 0, 0
    assert rank_correlation([1, 2, 3, 4, 5], [10, 30, 20, 400, 5000])[0] == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert rank_correlation([1, 2, 3], [3, 2, 1])[0] == pytest.approx(-1)
    # Ties share the mean of their ranks: x 1, 2.5, 2.5, 4; y 1, 3, 2, 4. Σxy deviations 4.5, of squares 4.5 and 5.
    assert rank_correlation([1, 2, 2, 9], [0, 7, 5, 8])[0] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3])[0])


def test_its_interval_draws_groups_together() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=g)
    y = 0.6 * x + 0.8 * torch.randn(400, generator=g)
    rho, low, high = rank_correlation(x.tolist(), y.tolist())
    assert low < rho < high
    se = (1 - rho**2) / 400**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * se, rel=0.25)  # Fisher's, to first order
    # Each pair four times over is no more evidence when the copies are drawn together, and is taken for more when not.
    x4, y4, same = x.tolist() * 4, y.tolist() * 4, list(range(400)) * 4
    together, apart = rank_correlation(x4, y4, same), rank_correlation(x4, y4)
    assert together[0] == pytest.approx(rho) and apart[2] - apart[1] < 0.6 * (high - low)
    assert together[2] - together[1] == pytest.approx(high - low, rel=0.15)
    assert rank_correlation(x4, y4, same) == together
    with pytest.raises(EditkitError, match="A rank correlation of 2 and 2 values"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(EditkitError, match="of 3 and 4 values"):
        rank_correlation([1, 2, 3], [1, 2, 3, 4])


def test_pairs_with_nan_are_left_out() -> None:
    nan = math.nan
    x, y = torch.tensor([1.0, 2.0, nan, 3.0, 9.0]), torch.tensor([3.0, 2.0, 5.0, 1.0, nan])
    assert spearman(x, y) == pytest.approx(-1)
