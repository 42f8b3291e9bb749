"""Win rates by judges with a known truth: intervals cover it, position and length do not change it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from align.evaluation.winrate import fit_weighted_logistic, length_control, win_rate
from align.stats import excludes
from reward_models.pairwise_judges import prefer_in_both_orders

SIMULATIONS = 500
RATE_TRUTH_DRAWS = 2_000_000


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def judge(
    rng: np.random.Generator, difference: np.ndarray, *, skill: float, slope: float, position: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts for A in both orders; P(A) = sigmoid(skill + slope tanh(d / spread)), plus ``position`` where first."""
    p = sigmoid(skill + slope * np.tanh(difference / spread))
    assert p.min() > position and p.max() < 1 - position
    first, second = rng.random(p.size) < p + position, rng.random(p.size) < p - position
    return first.astype(float), second.astype(float)


def test_95_percent_intervals_cover_the_truth_95_percent_of_the_time() -> None:
    """Plain and length-controlled win rate, from a judge biased by position and by length."""
    rng = np.random.default_rng(1)
    skill, slope, position, spread = 0.3, 0.8, 0.15, 40.0
    drawn = rng.normal(20.0, spread, RATE_TRUTH_DRAWS)
    rate = float(sigmoid(skill + slope * np.tanh(drawn / spread)).mean())
    controlled = float(sigmoid(np.array(skill)))
    assert rate - controlled > 0.05
    covered = np.zeros(2)
    for _ in range(SIMULATIONS):
        difference = rng.normal(20.0, spread, 150)
        first, second = judge(rng, difference, skill=skill, slope=slope, position=position, spread=spread)
        found = win_rate(first, second, 200 + difference, np.full(150, 200))
        assert found.length_controlled is not None
        both = (found.rate, rate), (found.length_controlled.rate, controlled)
        covered += [estimate.low <= truth <= estimate.high for estimate, truth in both]
    shares = covered / SIMULATIONS
    assert (shares >= 0.93).all() and (shares <= 0.97).all(), shares


def test_position_bias_cancels_and_is_told() -> None:
    rng = np.random.default_rng(0)
    first, second = judge(rng, np.zeros(4000), skill=0.0, slope=0.0, position=0.3, spread=1.0)
    found = win_rate(first, second, np.ones(4000), np.ones(4000))
    assert found.rate.low < 0.5 < found.rate.high and found.rate.high - found.rate.low < 0.04
    assert found.position_bias.low < 0.3 < found.position_bias.high
    assert first.mean() > 0.75  # the rate by one order alone


def test_a_judge_that_only_sees_the_position_gives_ties() -> None:
    found = win_rate(np.ones(30), np.zeros(30), np.arange(30), np.arange(30)[::-1])
    assert (found.wins, found.ties, found.losses) == (0, 30, 0) and found.consistent == 0
    assert found.rate.value == found.position_bias.value == 0.5
    assert found.rate.low is None and not excludes(found.rate, 0.5)  # thirty ties tell nothing


def test_rounding_decides_no_verdict() -> None:
    """Probabilities of a judge that reads the same text twice differ by the rounding of its batches."""
    first = np.array([0.7, 0.7 + 2e-7, 0.7 - 2e-7, 0.7])
    found = win_rate(first, [0.3, 0.3, 0.3, 0.31], np.ones(4), np.ones(4))
    assert (found.wins, found.ties, found.losses) == (1, 3, 0)


@pytest.mark.parametrize("sharp", [False, True])
def test_length_control_recovers_one_half_from_a_judge_that_only_sees_length(sharp: bool) -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(25.0, 30.0, 1500)
    p = sigmoid(2.0 * np.tanh(difference / difference.std())) if not sharp else (difference > 0).astype(float)
    first, second = ((rng.random(1500) < p).astype(float) for _ in range(2))
    found = win_rate(first, second, 100 + difference, np.full(1500, 100))
    assert found.rate.low > 0.65 and found.length_controlled is not None
    assert found.length_controlled.slope > 1.5 and not found.length_controlled.extrapolated
    assert found.length_controlled.rate.value == pytest.approx(0.5, abs=0.05)
    assert found.length_controlled.rate.low < 0.5 < found.length_controlled.rate.high


def test_length_control_changes_nothing_where_length_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    first = (rng.random(2000) < 0.65).astype(float)
    found = win_rate(first, first, rng.normal(100, 20, 2000), rng.normal(100, 20, 2000))
    assert found.length_controlled is not None
    assert found.length_controlled.rate.value == pytest.approx(found.rate.value, abs=0.005)
    equal = win_rate(first, first, np.full(2000, 9), np.full(2000, 9))
    assert equal.length_controlled is not None
    assert equal.length_controlled.rate.value == pytest.approx(equal.rate.value, abs=1e-4)


def test_winning_everywhere_is_not_certainty() -> None:
    found = win_rate(np.ones(20), np.ones(20), np.arange(20), np.full(20, 9))
    assert (found.rate.value, found.rate.high) == (1.0, 1.0)
    assert found.rate.low == pytest.approx(binomtest(20, 20).proportion_ci(method="wilson").low)
    assert found.length_controlled is not None and found.length_controlled.rate.low <= found.rate.low


def test_what_length_control_cannot_tell() -> None:
    outcome = np.array([1.0, 0.0, 1.0, 1.0])
    assert length_control(outcome, np.full(4, 7.0)) is None
    longer = length_control(outcome, np.array([1.0, 2.0, 3.0, 4.0]))
    assert longer is not None and longer.extrapolated
    shorter = length_control(outcome, -np.array([1.0, 2.0, 3.0, 4.0]))
    assert shorter is not None and shorter.extrapolated
    for within in ([-1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0], [-0.5, 0.5, 1.0, 2.0]):
        both = length_control(outcome, np.array(within))
        assert both is not None and not both.extrapolated
    always = length_control(np.ones(50), np.linspace(-1, 1, 50))
    assert always is not None and 0.99 < always.rate.value < 1 and np.isfinite(always.slope)


def test_the_fit_is_at_the_minimum_of_the_weighted_loss() -> None:
    """The fit beats a fine grid around it, for weights that repeat and leave out observations."""
    rng = np.random.default_rng(5)
    target, feature, weights = rng.random(40), rng.normal(size=40), rng.integers(0, 3, (3, 40))
    found = fit_weighted_logistic(target, feature, weights)

    def loss(a: float, b: float, weight: np.ndarray) -> float:
        z = a + b * feature
        cross = np.logaddexp(0, z) - target * z
        return float((weight * cross).sum() + 0.005 * a**2 + 0.05 * b**2)

    for (a, b), weight in zip(found, weights, strict=True):
        around = [loss(a + x, b + y, weight) for x in (-1e-3, 0, 1e-3) for y in (-1e-3, 0, 1e-3)]
        assert np.argmin(around) == 4


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2, st.integers(0, 50), st.integers(0, 50)), min_size=1,
             max_size=12)
)  # fmt: skip
def test_exchanging_the_policies_mirrors_the_result(rows: list[tuple[float, float, int, int]]) -> None:
    first, second, a, b = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    one = win_rate(first, second, a, b)
    other = win_rate(1 - second, 1 - first, b, a)
    assert one.rate.value == pytest.approx(1 - other.rate.value)
    if one.rate.low is None:
        assert other.rate.low is None
    else:
        assert (one.rate.low, one.rate.high) == pytest.approx((1 - other.rate.high, 1 - other.rate.low))
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.position_bias.value == pytest.approx(other.position_bias.value)
    assert one.length_difference.value == pytest.approx(-other.length_difference.value)
    assert one.wins + one.ties + one.losses == len(rows)
    if one.length_controlled is not None:
        assert other.length_controlled is not None
        assert one.length_controlled.rate.value == pytest.approx(1 - other.length_controlled.rate.value, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [([], [], "expected equal shapes"), ([1.0], [1.0, 0.0], "expected equal shapes"), ([1.5], [0.0], "must lie in")],
)
def test_what_is_not_a_preference_is_refused(first: list[float], second: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(first, second, np.ones(len(first)), np.ones(len(first)))


def test_a_judge_may_return_lists() -> None:
    class First:
        name = "first"

        def prefer(self, prompts: Any, first: Any, second: Any) -> list[float]:
            return [0.75] * len(prompts)

    shown_first, shown_second = prefer_in_both_orders(First(), ["p", "q"], ["a", "b"], ["c", "d"])  # type: ignore[arg-type]
    assert shown_first.tolist() == [0.75, 0.75] and shown_second.tolist() == [0.25, 0.25]
