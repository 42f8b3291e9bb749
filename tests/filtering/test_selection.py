"""Robust scaling, importance, top-k and greedy selection."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.filtering.scores import DUPLICATE_DISTANCE
from align.filtering.selection import (
    RobustScale,
    greedy,
    importance,
    robust_scale,
    top_k,
    warn_if_unranked,
    without_effect,
)
from tests.filtering.samples import unit

VALUES = st.lists(st.floats(-50, 50), min_size=2, max_size=30)


@given(VALUES, st.floats(0.1, 10), st.floats(-100, 100))
def test_robust_scaling_removes_location_and_scale(values: list[float], scale: float, shift: float) -> None:
    column = np.round(np.array(values), 3)
    assert np.allclose(robust_scale(column), robust_scale(scale * column + shift), atol=1e-6)
    assert np.median(robust_scale(column)) == pytest.approx(0, abs=1e-9)


@given(VALUES, st.integers(0, 999), st.data())
def test_selection_ignores_the_order_of_rows(values: list[float], seed: int, data: st.DataObject) -> None:
    column = np.round(np.array(values), 1)
    ids = [f"{k:03d}" for k in range(len(column))]
    count = data.draw(st.integers(1, len(column)))
    groups = data.draw(st.lists(st.sampled_from("ab"), min_size=len(column), max_size=len(column)))
    order = np.random.default_rng(seed).permutation(len(column))
    for chosen_groups in (None, groups):
        first = {ids[k] for k in top_k(column, ids, count, chosen_groups)}
        moved = None if chosen_groups is None else [chosen_groups[k] for k in order]
        second = {ids[order[k]] for k in top_k(column[order], [ids[k] for k in order], count, moved)}
        assert first == second and len(first) == count
    ranked = sorted(range(len(column)), key=lambda k: (-column[k], ids[k]))
    assert top_k(column, ids, count).tolist() == sorted(ranked[:count])
    assert min(column[top_k(column, ids, count)]) >= max(
        [v for k, v in enumerate(column) if k not in top_k(column, ids, count)], default=-99
    )


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 6), st.floats(0, 3))
def test_lazy_greedy_is_plain_greedy(seed: int, count: int, weight: float) -> None:
    """Against recomputing every gain before each pick."""
    rng = np.random.default_rng(seed)
    base, vectors, ids = rng.normal(size=9), unit(9, 3, seed), [f"{k}" for k in range(9)]
    kept: list[int] = []
    for _ in range(count):

        def gain(k: int, kept: tuple[int, ...] = tuple(kept)) -> float:
            nearest = min((np.sqrt(max(2 - 2 * float(vectors[j] @ vectors[k]), 0)) for j in kept), default=2.0)
            return float(base[k] + weight * np.log(max(nearest, DUPLICATE_DISTANCE)))

        kept.append(max((k for k in range(9) if k not in kept), key=gain))
    assert set(greedy(base, vectors, ids, count, weight=weight)) == set(kept)


def test_greedy_spreads_more_than_the_one_shot_score() -> None:
    """Two tight clusters far apart: the one-shot score takes both pairs from one, greedy covers both."""
    vectors = np.concatenate([np.tile(unit(1, 8, 1), (6, 1)), np.tile(unit(1, 8, 2), (6, 1))])
    base, ids = np.array([1.0] * 6 + [0.9] * 6), [f"{k:02d}" for k in range(12)]
    assert set(top_k(base, ids, 2)) == {0, 1} and set(greedy(base, vectors, ids, 2, weight=0.5)) == {0, 6}

    def value(chosen: tuple[int, int]) -> float:
        distance = np.linalg.norm(vectors[chosen[0]] - vectors[chosen[1]])
        return float(base[list(chosen)].sum() + 0.5 * np.log(max(distance, DUPLICATE_DISTANCE)))

    assert set(max(combinations(range(12), 2), key=value)) == {0, 6}


def test_nothing_is_kept_of_a_count_of_0() -> None:
    """The result still indexes rows."""
    vectors, ids = unit(3, 4, 0), ["a", "b", "c"]
    for kept in (greedy(np.zeros(3), vectors, ids, 0, weight=1.0), top_k(np.zeros(3), ids, 0)):
        assert len(kept) == 0 and len(vectors[kept]) == 0


def test_columns_that_are_the_same_for_all_pairs_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Only those with a weight; equal prompts are the usual reason for a diversity without effect."""
    columns = {"margin": np.array([1.0, 2.0]), "quality": np.ones(2), "diversity": np.zeros(2), "ood": np.zeros(2)}
    assert without_effect(columns, {"margin": 1.0, "quality": 0.5, "diversity": 0.5, "ood": 0.0}) == [
        "quality",
        "diversity",
    ]
    assert caplog.messages == [
        "quality: found the same value for all pairs that pass the rules, so it does not count",
        "diversity: found the same value for all pairs that pass the rules (equal prompts?), so it does not count",
    ]


@pytest.mark.parametrize(
    ("values", "kept", "warned"),
    [([0.0, 0.0, 0.0], 2, True), ([0.0, 0.0, 0.0], 3, False), ([0.0, 0.0, 0.1], 2, False)],
)
def test_a_choice_by_ids_alone_is_said(
    values: list[float], kept: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """All pairs have one importance and some are dropped; nothing is said where all are kept or one differs."""
    warn_if_unranked(np.array(values), kept)
    assert ("the 2 kept ones are those with the smallest ids" in caplog.text) == warned
    assert bool(caplog.messages) == warned


def test_importance_is_the_weighted_sum() -> None:
    columns = {"margin": np.array([2.0, 0, 3, 1]), "quality": np.array([0.0, 5, 1, 1])}
    margin = (columns["margin"] - 1.5) / (1.5 / 1.349)
    quality = (columns["quality"] - 1.0) / (1.25 / 1.349)
    quality[1] = 3.0  # 4.3 before the clip
    found = importance(columns, {"margin": 1.0, "quality": 0.2})
    assert found.tolist() == pytest.approx((margin + 0.2 * quality).tolist())
    assert importance(columns, {"margin": 0.0, "quality": 2.0}).tolist() == pytest.approx((2 * quality).tolist())


def test_scale_of_a_column_of_which_half_is_equal() -> None:
    """With an interquartile range of 0 the width is the standard deviation; without one, all scores are 0."""
    assert RobustScale.fit(np.array([0.0, 0, 0, 0, 10])).width == pytest.approx(4.0)
    assert robust_scale(np.array([0.0, 0, 0, 0, 10])).tolist() == pytest.approx([0, 0, 0, 0, 2.5])
    assert robust_scale(np.full(5, 2.0)).tolist() == [0.0] * 5


def test_one_odd_score_does_not_outweigh_the_others() -> None:
    """A pair whose quality is far below that of all others is kept for a margin that is far above theirs."""
    rng = np.random.default_rng(0)
    margin, quality = rng.normal(size=200), rng.normal(0.97, 0.01, size=200)
    margin[7], quality[7] = 6.0, 0.0
    weights = {"margin": 1.0, "quality": 0.5}
    values = importance({"margin": margin, "quality": quality}, weights)
    assert values[7] == pytest.approx(3 - 1.5) and 7 in top_k(values, np.arange(200), 40)
