"""Distance of every vector to its k-th nearest neighbor: exact for small sets, else an inverted file or HNSW graph.

Memory besides the vectors (N of D numbers, which may be memory-mapped): see exact.py and ivf.py; the graph needs one
float32 copy of the vectors and about 140 bytes of links for each.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from align.config import ClusterSection
from align.filtering.knn.centroids import import_faiss
from align.filtering.knn.exact import ADD_BLOCK, exact_distance
from align.filtering.knn.ivf import ivf_distance
from align.filtering.knn.recall import GroundTruth, tune_effort
from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import kth_neighbor
from align.io.console import progress
from align.io.files import atomic_write

Method = Literal["auto", "exact", "ivf", "hnsw"]
EXACT_LIMIT = 20_000
QUERIES = 8192
SAMPLE = 500
"""Rows on which the recall is measured."""
FIRST_EF, MOST_EF = 64, 4096
LINKS = 16
EF_CONSTRUCTION = 80


@dataclass(frozen=True, slots=True)
class Neighbors:
    """Distances to the k-th nearest neighbor, and the method and recall of the search."""

    distance: np.ndarray
    """[N], Euclidean."""
    method: str
    recall: float
    """Share of the k found that are no farther than the true k-th, on ``SAMPLE`` rows; 1 if exact."""

    def method_and_recall(self) -> dict[str, Any]:
        """All fields but the distances."""
        return {"method": self.method, "recall": self.recall}

    def write(self, file: Path) -> None:
        """Write an .npz file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, distance=self.distance, method=self.method, recall=self.recall)

    @classmethod
    def read(cls, file: Path) -> "Neighbors":
        """Read the file of ``write``."""
        with np.load(file, allow_pickle=False) as arrays:
            return cls(arrays["distance"], str(arrays["method"]), float(arrays["recall"]))


def kth_distance(
    vectors: np.ndarray,
    k: int,
    *,
    seed: int,
    folder: Path | None = None,
    rows: np.ndarray | None = None,
    method: Method = "auto",
    exact_limit: int = EXACT_LIMIT,
    cluster: ClusterSection | None = None,
) -> Neighbors:
    """Distance of each row to its k-th nearest other row.

    Args:
        vectors: [N, D], unit length.
        k: at least 1; reduced to N - 1 if there are fewer others.
        seed: seed of the index and of the rows on which its recall is measured.
        folder: caches the parts of the inverted file, so that a stopped search resumes; valid for the same arguments
            only. None: a stopped search starts over.
        rows: rows of ``vectors`` that are the set; None: all.
        method: ``auto`` is exact up to ``exact_limit`` rows and an inverted file beyond, which is deterministic under
            the seed; an HNSW graph built by several threads is not.
        exact_limit: see ``method``.
        cluster: its workers share the inverted file's work.

    Raises:
        EnvironmentProblem: an index is needed and faiss is not installed, or the cluster cannot be used.
        ValueError: there are fewer than two vectors.
    """
    view = View(vectors, rows)
    if len(view) < 2:
        raise ValueError("kth_distance needs at least two vectors")
    k = min(k, len(view) - 1)
    if method == "exact" or (method == "auto" and len(view) <= exact_limit):
        return Neighbors(exact_distance(view, np.arange(len(view)), k), "exact", 1.0)
    import_faiss()  # fails before the work begins if it is not installed
    sample = np.random.default_rng(seed).choice(len(view), min(SAMPLE, len(view)), replace=False)
    truth = GroundTruth(sample, k, exact_distance(view, sample, k))
    if method == "hnsw":
        return _hnsw_distance(view, truth)
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as place:
        return Neighbors(*ivf_distance(view, truth, seed=seed, folder=Path(place), cluster=cluster))


def _hnsw_distance(view: View, truth: GroundTruth) -> Neighbors:
    """Search in a hierarchical navigable small world graph (Malkov and Yashunin, arXiv 1603.09320)."""
    faiss = import_faiss()
    index = faiss.IndexHNSWFlat(view.size, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    blocks = list(view.blocks(ADD_BLOCK))
    for block in progress(blocks, what="index", total=len(blocks), unit="blocks"):
        index.add(view[block])

    def recall_of(candidates: int) -> float:
        index.hnsw.efSearch = candidates
        return truth.recall(view, _search(index, view, truth.rows, truth.k)[1])

    recall, candidates = tune_effort(FIRST_EF, MOST_EF, recall_of)
    distance = np.empty(len(view))
    parts = list(view.blocks(QUERIES))
    for rows in progress(parts, what="nearest neighbors", total=len(parts), unit="blocks"):
        distance[rows], _ = _search(index, view, rows, truth.k)
    return Neighbors(distance, f"HNSW graph of {LINKS} links, {candidates} candidates", recall)


def _search(index: Any, view: View, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the k-th neighbor and the neighbors [R, k]; a row is not its own neighbor."""
    similarity, indices = index.search(view[rows], k + 1)
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True
    values, neighbors = similarity[~own].reshape(len(rows), k), indices[~own].reshape(len(rows), k)
    return view.distances(rows, kth_neighbor(values, neighbors)), neighbors
