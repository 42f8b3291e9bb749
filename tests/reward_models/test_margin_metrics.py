"""Accuracy, log loss, Brier score and calibration error of margins, against plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.margin_metrics import evaluate_margins


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=50))
def test_calibration_against_plain_python(margins: list[float]) -> None:
    found = evaluate_margins(margins)
    assert found.accuracy.value == pytest.approx(sum(0.5 if m == 0 else float(m > 0) for m in margins) / len(margins))
    assert found.log_loss == pytest.approx(sum(np.log1p(np.exp(-m)) for m in margins) / len(margins))
    assert found.brier == pytest.approx(sum((1 - 1 / (1 + np.exp(-m))) ** 2 for m in margins) / len(margins))
    assert sum(item.count for item in found.bins) == len(margins)
    assert 0 <= found.ece <= 1
    for item in found.bins:
        assert item.low - 1e-12 <= item.confidence <= item.high + 1e-12
    low, high = found.accuracy.low, found.accuracy.high
    if low is None or high is None:  # one pair, or nothing but ties
        assert len(margins) == 1 or not any(margins)
    else:
        assert low <= found.accuracy.value <= high


def test_calibration_of_honest_margins_is_near_zero() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 20000)
    right = rng.random(20000) < 1 / (1 + np.exp(-np.abs(true)))
    assert evaluate_margins(np.where(right, np.abs(true), -np.abs(true))).ece < 0.02
    with pytest.raises(ValueError, match="finite"):
        evaluate_margins([float("nan")])


def test_bins_and_calibration_error_by_hand() -> None:
    """Confidences 0.52, 0.53 (one wrong) and 0.97 (right): two bins, an error of (2 * 0.025 + 0.03) / 3."""
    margins = [np.log(0.52 / 0.48), -np.log(0.53 / 0.47), np.log(0.97 / 0.03)]
    found = evaluate_margins(margins)
    first, last = found.bins
    assert (first.low, first.high, first.count) == (0.5, pytest.approx(0.55), 2)
    assert (last.low, last.high, last.count) == (pytest.approx(0.95), 1.0, 1)
    assert (first.confidence, first.accuracy) == (pytest.approx(0.525), 0.5)
    assert (last.confidence, last.accuracy) == (pytest.approx(0.97), 1.0)
    assert found.ece == pytest.approx((2 * 0.025 + 0.03) / 3)
    (certain,) = evaluate_margins([50.0]).bins
    assert (certain.low, certain.high) == (pytest.approx(0.95), 1.0)
