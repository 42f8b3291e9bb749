"""The inverted file and the HNSW graph: close to exact, resumable, whatever the shares."""

import resource
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from align.filtering.knn.exact import exact_distance
from align.filtering.knn.ivf import ShareSearch, share_search
from align.filtering.knn.ivf_lists import ShareQueries, write_inverted_lists
from align.filtering.knn.recall import WANTED_RECALL
from align.filtering.knn.row_view import View
from align.filtering.knn.search import kth_distance
from align.filtering.knn.top_k import TopK
from align.sharding.arrays import as_array
from tests.filtering.samples import clustered, unit


@pytest.mark.parametrize(("method", "label"), [("auto", "inverted file"), ("hnsw", "HNSW graph")])
def test_an_index_is_close_to_exact(method: str, label: str) -> None:
    """On clustered vectors: recall, rank correlation, and for the inverted file the same answer twice."""
    vectors = clustered(6000)
    found = kth_distance(vectors, 5, seed=0, exact_limit=1000, method=method)  # type: ignore[arg-type]
    exact = exact_distance(View(vectors), np.arange(6000), 5)
    assert found.method.startswith(label) and found.recall >= 0.95
    assert spearmanr(found.distance, exact).statistic >= 0.99
    again = kth_distance(vectors, 5, seed=0, exact_limit=1000, method=method)  # type: ignore[arg-type]
    assert method == "hnsw" or np.array_equal(found.distance, again.distance)


def test_shares_change_nothing_and_a_stopped_search_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """About a seventh of the vectors is in memory at a time. A search that is stopped in a share, or while the answers
    of a share are merged, resumes there."""
    vectors = clustered(6000)
    whole = kth_distance(vectors, 5, seed=0, exact_limit=1000)
    monkeypatch.setattr("align.filtering.knn.ivf_lists.SHARE_BYTES", 900 * 4 * 32)
    shared = kth_distance(vectors, 5, seed=0, exact_limit=1000)
    assert np.array_equal(whole.distance, shared.distance) and whole.recall == shared.recall
    begun: list[int] = []
    start, flush = ShareSearch.start, np.memmap.flush

    def counted(self: ShareSearch) -> Any:
        begun.append(self.first)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return start(self)

    def stopped(self: np.memmap) -> None:
        if len(begun) == 5:
            begun.append(-1)
            raise KeyboardInterrupt
        flush(self)

    monkeypatch.setattr(ShareSearch, "start", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            kth_distance(vectors, 5, seed=0, exact_limit=1000, folder=tmp_path)
        monkeypatch.setattr(np.memmap, "flush", stopped)
    again = kth_distance(vectors, 5, seed=0, exact_limit=1000, folder=tmp_path)
    assert begun[2] == begun[3] and begun[4] == max(begun[:5]) < begun[6], "each share is searched once"
    assert begun == [*sorted(begun[:3]), begun[2], begun[4], -1, *sorted(begun[6:])] and 7 <= len(begun) - 2 <= 9
    assert np.array_equal(again.distance, whole.distance)


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 6))
def test_every_vector_is_stored_once_and_probes_the_shares_of_its_lists(seed: int, count: int, probes: int) -> None:
    """For any lists and size of a share: sorted by list, shares of complete lists, nothing lost."""
    rng, probes = np.random.default_rng(seed), min(probes, count)
    vectors_of, rows = unit(50, 4, seed), np.sort(rng.permutation(50)[:40])
    near = np.stack([rng.permutation(count)[:probes] for _ in rows]).astype(np.int32)
    with (
        TemporaryDirectory() as folder,
        patch("align.filtering.knn.ivf_lists.SHARE_BYTES", int(rng.integers(1, 12)) * 16),
    ):
        listed = write_inverted_lists(View(vectors_of, rows), near, count, Path(folder) / "lists")
        place = listed.records["place"]
        assert np.array_equal(np.sort(place), np.arange(40)) and np.array_equal(listed.records["list"], near[place])
        assert np.array_equal(listed.vectors(slice(0, 40)), vectors_of[rows[place]])
        assert (np.diff(listed.records["list"][:, 0]) >= 0).all()
        shares = len(listed.starts) - 1
        for share in range(shares):
            within, lists = slice(*listed.starts[share : share + 2]), listed.lists_of(share)
            assert set(listed.records["list"][within, 0].tolist()) <= set(lists) and within.start < within.stop
            table = listed.queries(share)
            visits = (listed.share_of[listed.records["list"]] == share).any(axis=1)
            assert np.array_equal(table.positions, np.flatnonzero(visits))
            own = as_array(table.select(range(len(table))), "list")
            known = listed.records["list"][table.positions]
            for found, asked in zip(own.tolist(), known.tolist(), strict=True):
                inside = [number - lists.start for number in asked if number in lists]
                assert found == inside + [-1] * (own.shape[1] - len(inside))


def test_a_vector_probes_few_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cost of a search grows with the shares that a vector probes, not with the number of shares."""
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, size=8000)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    searched: list[int] = []
    count = ShareQueries.__len__
    monkeypatch.setattr(ShareSearch, "start", lambda self, start=ShareSearch.start: searched.append(0) or start(self))
    monkeypatch.setattr("align.filtering.knn.ivf_lists.SHARE_BYTES", 200 * 4 * 2)
    visits: dict[int, int] = {}
    monkeypatch.setattr(ShareQueries, "__len__", lambda self: visits.setdefault(self.share, count(self)))
    found = kth_distance(circle, 5, seed=0, exact_limit=1000)
    assert found.recall >= WANTED_RECALL and len(searched) == len(visits) >= 35
    assert sum(visits.values()) <= 3 * 8000


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 40))
def test_shares_give_the_exact_top_k(seed: int, k: int, size: int) -> None:
    """If every list is probed, for any size of a share."""
    vectors_of, count = unit(40, 4, seed), 7
    rng = np.random.default_rng(seed)
    near = np.stack([rng.permutation(count) for _ in range(40)]).astype(np.int32)
    with TemporaryDirectory() as folder, patch("align.filtering.knn.ivf_lists.SHARE_BYTES", size * 16):
        listed = write_inverted_lists(View(vectors_of), near, count, Path(folder) / "lists")
        best = TopK(Path(folder) / "best", 40, k)
        for share in range(len(listed.starts) - 1):
            table = listed.queries(share)
            made = share_search(listed, share, k).start()(table.select(range(len(table))))
            best.merge(share, table.positions, {name: as_array(made, name) for name in made.column_names})
        ordered = listed.vectors(slice(0, 40))
        cosine = ordered @ ordered.T
        np.fill_diagonal(cosine, -np.inf)
        expected = np.sort(cosine, axis=1)[:, -k:]
        assert np.allclose(np.sort(best.similarity, axis=1), expected, atol=1e-5)
        assert np.allclose(np.take_along_axis(cosine, best.place, axis=1), best.similarity, atol=1e-5)


def test_a_vector_that_finds_too_few_is_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most vectors are equal, so near copies of one centroid have nearly empty lists."""
    copies = np.repeat(unit(1, 8), 5500, axis=0)
    around = copies[:500] + 0.02 * np.random.default_rng(0).normal(size=(500, 8))
    vectors_of = np.concatenate([copies, around / np.linalg.norm(around, axis=1, keepdims=True)]).astype(np.float32)
    alone: list[int] = []
    monkeypatch.setattr(
        "align.filtering.knn.ivf.exact_distance",
        lambda view, rows, k: alone.extend(rows.tolist()) or exact_distance(view, rows, k),
    )
    found = kth_distance(vectors_of, 5, seed=0, exact_limit=1000).distance
    exact = exact_distance(View(vectors_of), np.arange(6000), 5)
    assert alone and np.allclose(found[alone], exact[alone], atol=1e-5)
    assert (found >= exact - 1e-3).all(), "no distance is below the exact one"


@pytest.mark.parametrize("count", [2, 5, 13])
def test_an_inverted_file_of_a_few_vectors(count: int) -> None:
    vectors_of = unit(count, 4)
    found = kth_distance(vectors_of, 3, seed=0, method="ivf")
    exact = exact_distance(View(vectors_of), np.arange(count), min(3, count - 1))
    assert np.allclose(found.distance, exact, atol=1e-5)


def test_a_missing_list_is_not_probed(tmp_path: Path) -> None:
    """An HNSW graph of centroids may find fewer lists than requested; -1 stands for none."""
    near = np.array([[0, -1, 1], [1, -1, -1], [2, 1, -1]], dtype=np.int32)
    with patch("align.filtering.knn.ivf_lists.SHARE_BYTES", 16):
        listed = write_inverted_lists(View(unit(3, 4)), near, 3, tmp_path / "lists")
    searched = [listed.queries(share).positions.tolist() for share in range(3)]
    assert searched == [[0], [0, 1, 2], [2]]
    table = listed.queries(2)
    assert as_array(table.select(range(1)), "list").tolist() == [[0]]


def test_a_full_disk_loses_no_rows(tmp_path: Path) -> None:
    """The last bytes of a file may still be in a buffer when the disk is full: closing it must raise."""
    near = np.zeros((100, 1), dtype=np.int32)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_inverted_lists(View(unit(100, 4)), near, 1, tmp_path / "lists")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not (tmp_path / "lists").exists()
    listed = write_inverted_lists(View(unit(100, 4)), near, 1, tmp_path / "lists")
    assert np.array_equal(np.sort(listed.records["place"]), np.arange(100))


def test_two_levels_of_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for millions of vectors, with a graph of centroids: as close to exact, and the same answer twice."""
    vectors = clustered(6000)
    monkeypatch.setattr("align.filtering.knn.centroids.FLAT_CENTROIDS", 100)
    found, again = (kth_distance(vectors, 5, seed=0, exact_limit=1000) for _ in range(2))
    assert found.recall >= 0.95 and np.array_equal(found.distance, again.distance)
    assert spearmanr(found.distance, exact_distance(View(vectors), np.arange(6000), 5)).statistic >= 0.99
