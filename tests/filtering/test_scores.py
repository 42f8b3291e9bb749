"""Scores without a model: diversity, doubtful labels, margins over their spread, effective number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import digamma

from align.filtering.knn.search import kth_distance
from align.filtering.scores import DUPLICATE_DISTANCE, diversity, doubtful, effective_number, over_spread
from tests.filtering.samples import unit


@pytest.mark.parametrize("scale", [0.2, 0.4])
def test_entropy_of_a_known_distribution(scale: float) -> None:
    """Kozachenko-Leonenko with these distances gives the entropy of a normal patch of the circle."""
    angle = np.random.default_rng(0).normal(scale=scale, size=1000)
    found = kth_distance(np.stack([np.cos(angle), np.sin(angle)], axis=1), 5, seed=0)
    estimate = np.log(found.distance).mean() + np.log(2) + digamma(1000) - digamma(5)
    assert estimate == pytest.approx(0.5 * np.log(2 * np.pi * np.e * scale**2), abs=0.1)


def test_duplicates_have_a_finite_score() -> None:
    vectors = np.repeat(unit(3, 4), 4, axis=0)
    scores = diversity(kth_distance(vectors, 2, seed=0).distance)
    assert np.isfinite(scores).all() and scores.min() == pytest.approx(np.log(DUPLICATE_DISTANCE))


def test_effective_number() -> None:
    assert effective_number(np.eye(7)) == pytest.approx(7)
    assert effective_number(np.tile(unit(1, 5), (9, 1))) == pytest.approx(1)
    mixed = np.concatenate([np.tile(np.eye(4)[:1], (6, 1)), np.eye(4)[1:3]])
    share = np.array([6, 1, 1]) / 8
    assert effective_number(mixed) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert effective_number(mixed, np.array([0, 6]), block=1) == pytest.approx(2)


@given(st.integers(0, 99), st.floats(0.05, 0.4))
def test_doubtful_labels_are_flipped_ones(seed: int, rate: float) -> None:
    """If margins know the truth, no right label is doubtful, and every flipped one of at least mean confidence is."""
    rng = np.random.default_rng(seed)
    flipped = rng.random(400) < rate
    truth = rng.uniform(1.5, 4, size=400)
    found = doubtful(np.where(flipped, -truth, truth))
    belief = 1 / (1 + np.exp(-truth))
    assert not found[~flipped].any() and found[flipped & (belief >= belief.mean())].all()


def test_a_weak_contradiction_is_no_doubt() -> None:
    margins = np.array([3.0, 3.0, 3.0, 3.0, -0.1, -5.0])
    assert doubtful(margins).tolist() == [False, False, False, False, False, True]
    assert not doubtful(np.zeros(5)).any()
    belief = np.array([[0.95, 0.95, 0.95, 0.25], [0.95, 0.95, 0.95, 0.2]])  # means 0.775 and 0.7625
    assert [doubtful(row).tolist() for row in np.log(belief / (1 - belief))] == [[False] * 4, [False] * 3 + [True]]


def test_margin_over_its_spread() -> None:
    found = over_spread(np.array([2.0, 2.0, -2.0, 2.0]), np.array([0.0, 1.0, 1.0, 9.0]))
    assert found.tolist() == [2.0, 1.0, -1.0, 0.2]
    zeros = np.zeros(100_000)
    for filled in (1.0, np.nan):
        used = np.full(100_000, filled)
        del used  # its memory, not zeroed, is that of the next result
        assert not over_spread(np.full(100_000, 2.0), zeros).any()
