"""Exact nearest neighbors, against brute force."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.filtering.knn.search import Neighbors, kth_distance
from tests.filtering.samples import clustered, unit


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 99))
def test_against_brute_force(count: int, k: int, seed: int) -> None:
    vectors = unit(count, 4, seed)
    found = kth_distance(vectors, k, seed=0)
    full = np.linalg.norm(vectors[:, None].astype(float) - vectors[None], axis=2)
    np.fill_diagonal(full, np.inf)
    expected = np.sort(full, axis=1)[:, min(k, count - 1) - 1]
    assert np.allclose(found.distance, expected, atol=1e-3) and found.recall == 1.0


def test_blocks_and_selected_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the size of the blocks nor rows that are not selected."""
    vectors, places = clustered(500), np.random.default_rng(0).permutation(500)[:333]
    whole = kth_distance(vectors[places], 7, seed=0).distance
    monkeypatch.setattr("align.filtering.knn.exact.ADD_BLOCK", 40)
    monkeypatch.setattr("align.filtering.knn.exact.BLOCK", 17)
    assert np.allclose(kth_distance(vectors, 7, seed=0, rows=places).distance, whole, atol=1e-6)


def test_written_neighbors_are_read_again(tmp_path: Path) -> None:
    """In a folder two levels deep that does not exist yet."""
    found = Neighbors(np.array([0.5, 1.0]), "exact", 1.0)
    file = tmp_path / "a" / "b" / "neighbors.npz"
    found.write(file)
    again = Neighbors.read(file)
    assert again.distance.tolist() == [0.5, 1.0] and again.method_and_recall() == {"method": "exact", "recall": 1.0}
