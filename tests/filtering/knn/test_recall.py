"""Recall on a sample with known neighbors, and the effort that it takes."""

import numpy as np
import pytest

from align.filtering.knn.exact import exact_distance
from align.filtering.knn.recall import WANTED_RECALL, GroundTruth, ProbeRecall
from align.filtering.knn.row_view import View
from align.filtering.knn.search import kth_distance
from align.io.console import log
from tests.filtering.samples import clustered, unit


def test_few_pairs_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all vectors are in one list, which half of the sample probes; the recall is that of larger blocks."""
    vectors_of = clustered(3000)
    near = np.random.default_rng(0).integers(1, 40, size=(3000, 4)).astype(np.int32)
    near[:1500, 0] = 0
    view, true = (
        View(vectors_of),
        GroundTruth(np.arange(0, 3000, 10), 5, exact_distance(View(vectors_of), np.arange(0, 3000, 10), 5)),
    )
    whole = ProbeRecall(view, true, near, 40)
    expected, asked, einsum = whole.recall(4), [], np.einsum
    monkeypatch.setattr("align.filtering.knn.recall.PAIR_BYTES", 1000 * 4 * 32)
    monkeypatch.setattr(np, "einsum", lambda how, a, b: asked.append(len(a)) or einsum(how, a, b))
    parts = ProbeRecall(view, true, near, 40)
    assert parts.recall(4) == expected and np.array_equal(np.sort(parts.best["place"]), np.sort(whole.best["place"]))
    assert max(asked) <= 1000 and sum(asked) > 100_000


def test_the_search_for_recall_stops_where_it_costs_too_much(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On vectors without structure it would compare too many, so it warns with the recall that it has."""
    vectors_of, exact = unit(6000, 32), 1000
    monkeypatch.setattr("align.filtering.knn.ivf.MOST_COMPARED", 6000 * 20 // 309)
    monkeypatch.setattr(log, "propagate", True)  # the command line turns it off
    found = kth_distance(vectors_of, 5, seed=0, exact_limit=exact)
    assert found.method == "inverted file of 309 lists, 19 probed" and found.recall < WANTED_RECALL
    assert f"recall {100 * found.recall:.1f}%, expected 97%" in caplog.text
    monkeypatch.undo()
    assert kth_distance(vectors_of, 5, seed=0, exact_limit=exact).recall >= WANTED_RECALL


@pytest.mark.parametrize("method", ["ivf", "hnsw"])
def test_ties_count_as_found(method: str) -> None:
    """Each vector has more copies than neighbors are requested, so any of the copies is right."""
    vectors_of = np.repeat(clustered(400), 15, axis=0)
    found = kth_distance(vectors_of, 5, seed=0, method=method)  # type: ignore[arg-type]
    assert found.recall >= 0.97 and np.mean(found.distance < 1e-6) >= 0.97
    assert int(found.method.split()[-2]) == {"ivf": 8, "hnsw": 64}[method], "no more effort than at first"
