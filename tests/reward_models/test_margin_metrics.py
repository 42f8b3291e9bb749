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
