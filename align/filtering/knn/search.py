"""Distance of every vector to its k-th nearest neighbour: exact for small sets, an inverted file or HNSW graph beyond.

Memory beside the vectors (N of D numbers, which may lie in a memory-mapped file): see ``exact`` and ``inverted``; in
the graph one float32 copy of the vectors and about 140 bytes of links for each.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from align.config import ClusterSection
from align.filtering.knn.centroids import faiss
from align.filtering.knn.exact import ADD_BLOCK, exact_distance
from align.filtering.knn.ivf import search
from align.filtering.knn.recall import Sample, enough
from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import farthest
from align.io.console import progress
from align.io.files import atomic_write

Method = Literal["auto", "exact", "ivf", "hnsw"]
EXACT_LIMIT = 20_000
QUERIES = 8192
SAMPLE = 500
FIRST_EF, MOST_EF = 64, 4096
LINKS = 16
EF_CONSTRUCTION = 80


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Distances to the k-th neighbour and how they were found."""

    distance: np.ndarray
    """[N], Euclidean."""
    method: str
    recall: float
    """Share of the k found that are no farther than the true k-th, on ``SAMPLE`` rows; 1 where exact."""

    def how(self) -> dict[str, Any]:
        """All but the distances."""
        return {"method": self.method, "recall": self.recall}

    def write(self, file: Path) -> None:
        """Into an .npz file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, distance=self.distance, method=self.method, recall=self.recall)

    @classmethod
    def read(cls, file: Path) -> "Neighbours":
        """What ``write`` wrote."""
        with np.load(file, allow_pickle=False) as found:
            return cls(found["distance"], str(found["method"]), float(found["recall"]))


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
) -> Neighbours:
    """Distance of each row to its k-th nearest other row.

    Args:
        vectors: [N, D], unit length.
        k: at least 1; N - 1 where there are fewer others.
        seed: of the index and of the rows on which its recall is measured.
        folder: keeps what the inverted file has found out until it is done; valid for the same arguments only. Where
            absent, a stopped search begins anew.
        rows: those of ``vectors`` that the set consists of; all where absent.
        method: ``auto`` is exact up to ``exact_limit`` rows and an inverted file beyond, which gives the same answer
            under the same seed; a graph that several threads build does not.
        exact_limit: see ``method``.
        cluster: whose workers share the inverted file's work.

    Raises:
        EnvironmentProblem: an index is needed and faiss is not installed, or the cluster is of no use.
        ValueError: fewer than two vectors.
    """
    view = View(vectors, rows)
    if len(view) < 2:
        raise ValueError("kth_distance needs at least two vectors")
    k = min(k, len(view) - 1)
    if method == "exact" or (method == "auto" and len(view) <= exact_limit):
        return Neighbours(exact_distance(view, np.arange(len(view)), k), "exact", 1.0)
    faiss()  # whether it is there, before the work begins
    sample = np.random.default_rng(seed).choice(len(view), min(SAMPLE, len(view)), replace=False)
    true = Sample(sample, k, exact_distance(view, sample, k))
    if method == "hnsw":
        return _by_graph(view, true)
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as place:
        return Neighbours(*search(view, true, seed=seed, folder=Path(place), cluster=cluster))


def _by_graph(view: View, true: Sample) -> Neighbours:
    """Hierarchical navigable small world graph (Malkov and Yashunin, arXiv 1603.09320)."""
    index = faiss().IndexHNSWFlat(view.size, LINKS, faiss().METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    blocks = list(view.blocks(ADD_BLOCK))
    for block in progress(blocks, what="index", total=len(blocks), unit="blocks"):
        index.add(view[block])

    def recall_of(candidates: int) -> float:
        index.hnsw.efSearch = candidates
        return true.recall(view, _search(index, view, true.rows, true.k)[1])

    recall, candidates = enough(FIRST_EF, MOST_EF, recall_of)
    distance = np.empty(len(view))
    parts = list(view.blocks(QUERIES))
    for rows in progress(parts, what="neighbours", total=len(parts), unit="blocks"):
        distance[rows], _ = _search(index, view, rows, true.k)
    return Neighbours(distance, f"HNSW graph of {LINKS} links, {candidates} candidates", recall)


def _search(index: Any, view: View, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the k-th neighbour and the neighbours [R, k]; a row is not its own neighbour."""
    similarity, indices = index.search(view[rows], k + 1)
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True
    values, nearest = similarity[~own].reshape(len(rows), k), indices[~own].reshape(len(rows), k)
    return view.distances(rows, farthest(values, nearest)), nearest
