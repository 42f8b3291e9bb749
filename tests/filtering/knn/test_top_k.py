"""Merging the answers of shares: each counts once, and an interrupted merge is rolled back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.filtering.knn.top_k import TopK


def test_answers_merged_twice_count_once(tmp_path: Path) -> None:
    best = TopK(tmp_path / "best", 3, 2)
    first = {"similarity": np.array([[0.9, 0.5], [0.4, -np.inf]]), "place": np.array([[2, 1], [0, -1]])}
    second = {"similarity": np.array([[0.7, 0.6]]), "place": np.array([[3, 4]])}
    for _ in range(2):
        best.merge(0, np.array([0, 2]), first)
    best.merge(1, np.array([0]), second)
    again = TopK(tmp_path / "best", 3, 2)
    assert again.holds(0) and again.holds(1) and not again.holds(2)
    assert [set(row) for row in again.place.tolist()] == [{2, 3}, {-1}, {0, -1}]
    assert np.sort(again.similarity[0]) == pytest.approx([0.7, 0.9])


class Interrupted:
    """An array in which a write is interrupted after its first row."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.array[rows]

    def __setitem__(self, rows: Any, values: np.ndarray) -> None:
        self.array[rows[:1]] = values[:1]
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["similarity", "place"])
def test_an_interrupted_merge_is_rolled_back(name: str, tmp_path: Path) -> None:
    """In the middle of either file: the old rows come back, and the share can be merged again."""
    rows = np.array([0, 1])
    first = {"similarity": np.array([[0.3, 0.2]] * 2), "place": np.array([[10, 11]] * 2)}
    second = {"similarity": np.array([[0.9, 0.1]] * 2), "place": np.array([[20, 21]] * 2)}
    best = TopK(tmp_path / "best", 2, 2)
    best.merge(0, rows, first)
    setattr(best, name, Interrupted(getattr(best, name)))
    with pytest.raises(KeyboardInterrupt):
        best.merge(1, rows, second)
    again = TopK(tmp_path / "best", 2, 2)
    assert np.array_equal(np.sort(again.place), [[10, 11]] * 2) and not again.holds(1)
    again.merge(1, rows, second)
    for place, similarity in zip(again.place, again.similarity, strict=True):
        assert dict(zip(place.tolist(), similarity.tolist(), strict=True)) == pytest.approx({20: 0.9, 10: 0.3})
