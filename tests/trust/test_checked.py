"""Verdicts on sources, the share of checked pairs, and the penalty that selected pairs would choose: planted worlds."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from align.data.checked_pairs import default_share
from align.trust.checked import checked_agreement, choose_share, judge_sources
from align.trust.linear_proxy import scaled
from align.trust.weighted_heads import PENALTIES, choose_penalty, fit_weighted

SIZE = 8


def world(count: int, seed: int, flips: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Differences [N, D] with labels of a planted direction, and the direction."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=SIZE) * 2 / np.sqrt(SIZE)
    x = rng.normal(size=(count, SIZE))
    wrong = (rng.random(count) > expit(x @ truth)) ^ (rng.random(count) < flips)
    return np.where(wrong[:, None], -x, x), truth, rng


def test_weighted_heads_are_the_minimum() -> None:
    """Against L-BFGS on the formula; a weight of 2 is the pair twice, a weight of 0 no pair."""
    x, _, rng = world(60, 0)
    weights = np.stack([rng.integers(0, 3, 60).astype(float), np.ones(60)], axis=1)
    heads = fit_weighted(x, weights, np.array([0.1, 0.01]))

    def value(theta: np.ndarray) -> float:
        w = weights[:, 0]
        return float(w @ np.logaddexp(0, -x @ theta) + 0.1 * w.sum() * theta @ theta / 2)

    assert heads[:, 0] == pytest.approx(minimize(value, np.zeros(SIZE), tol=1e-12).x, abs=1e-4)
    repeated = np.repeat(x, weights[:, 0].astype(int), axis=0)
    assert heads[:, 0] == pytest.approx(fit_weighted(repeated, np.ones((len(repeated), 1)), 0.1)[:, 0], abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_selected_pairs_choose_the_smallest_penalty_and_all_pairs_do_not(seed: int) -> None:
    """40% of the labels are flipped; the half that agrees most with a head looks separable."""
    x, _, rng = world(600, seed, flips=0.4)
    x = scaled(x)
    fold = rng.permutation(len(x)) % 5
    penalty = choose_penalty(x, fold)
    gaps = x @ fit_weighted(x, np.ones((len(x), 1)), penalty)[:, 0]
    kept = gaps > np.median(gaps)
    assert choose_penalty(x, fold, kept) == PENALTIES[0]
    assert penalty > PENALTIES[0]


@pytest.mark.parametrize("checked", [0, 50])
def test_a_reversed_source_is_named_and_no_other(checked: int) -> None:
    for seed in range(5):
        x, truth, rng = world(1000, seed)
        sources = np.array(["a", "b", "c", "d", "e"])[rng.integers(0, 5, 1000)]
        x[sources == "c"] *= -1
        own = np.abs(rng.normal(size=(checked, 1))) * truth
        found = judge_sources(x, list(sources), own, 0.01)
        assert [one.source for one in found if one.named] == ["c"]
        assert found[2].agreement.value < 0.5 < found[0].agreement.value
        assert found[2].agreement.low < found[2].agreement.value < found[2].agreement.high


def test_a_source_of_close_pairs_is_not_named() -> None:
    """Its labels agree less often, as the head expects of pairs that are close."""
    named = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=SIZE)
        x = rng.normal(size=(1500, SIZE))
        close = np.arange(1500) % 5 == 0
        x[close] *= 0.3
        x[rng.random(1500) > expit(x @ truth)] *= -1
        found = judge_sources(x, ["close" if one else f"far {k % 5}" for k, one in enumerate(close)], x[:0], 0.01)
        assert found[0].agreement.value < min(one.agreement.value for one in found[1:]) - 0.05
        named += any(one.named for one in found)
    assert named <= 1


def test_small_sources_and_single_ones_have_no_verdict() -> None:
    """Ten pairs, one pair, and no other source."""
    x = world(200, 0)[0]
    found = judge_sources(x, ["ten"] * 10 + ["one"] + ["rest"] * 189, x[:0], 0.01)
    assert {one.source: one.z is None for one in found} == {"one": True, "rest": False, "ten": True}
    assert not any(one.named for one in found)
    alone = judge_sources(x, ["only"] * 200, x[:0], 0.01)
    assert [(one.z, one.named) for one in alone] == [(None, False)]


def test_repeated_pairs_count_once() -> None:
    """The same pairs five times give the same z as once, if they are told to be clusters."""
    x = world(200, 3)[0]
    sources = ["a" if k % 2 else "b" for k in range(200)]
    once = judge_sources(x, sources, x[:0], 0.01)
    many = judge_sources(np.tile(x, (5, 1)), sources * 5, x[:0], 0.01, clusters=np.tile(np.arange(200), 5))
    assert [one.z for one in many] == pytest.approx([one.z for one in once], rel=0.02)


def test_the_share_is_raised_only_where_it_must_be() -> None:
    """Labels by another direction: raised; labels as good as the checked ones: the default."""
    x, truth, rng = world(800, 0)
    own = rng.normal(size=(200, SIZE))
    own[rng.random(200) > expit(own @ truth)] *= -1
    fold = np.arange(200) % 10
    good = choose_share(x, own, fold, 0.003)
    assert good.share == good.default == default_share(200, 800)
    other = rng.normal(size=SIZE)
    bad = rng.normal(size=(800, SIZE))
    bad[rng.random(800) > expit(bad @ other)] *= -1
    raised = choose_share(bad, own, fold, 0.003)
    assert raised.share > raised.default
    gain, error = raised.gains[raised.share]
    assert gain > 2 * error
    few = choose_share(bad, own[:10], fold[:10], 0.003)
    assert few.share == few.default


def test_a_majority_of_wrong_labels_shows_in_the_checked_pairs() -> None:
    x, truth, _ = world(500, 1)
    own = np.abs(np.random.default_rng(5).normal(size=(40, 1))) * truth + 0.1
    assert checked_agreement(x, own, 0.01).value > 0.9
    assert checked_agreement(-x, own, 0.01).high < 0.5
