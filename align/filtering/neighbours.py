"""Distance of every vector to its k-th nearest neighbour: exact for small sets, an inverted file or HNSW graph beyond.

Memory beside the vectors (N of D numbers, which may lie in a memory-mapped file): some blocks of ``BLOCK`` x
``ADD_BLOCK`` similarities when exact; one float32 copy of the vectors in the inverted file; that and about 140 bytes of
links per vector in the graph.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from align.console import log, progress
from align.errors import EnvironmentProblem

Method = Literal["auto", "exact", "ivf", "hnsw"]
EXACT_LIMIT = 20_000
BLOCK = 1024
ADD_BLOCK = 65_536
SAMPLE = 500
WANTED_RECALL = 0.97
FIRST_PROBES = 8
FIRST_EF = 64
LINKS = 16
EF_CONSTRUCTION = 80
POINTS_PER_LIST = 64
TRAINING_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Distances to the k-th neighbour and how they were found."""

    distance: np.ndarray
    """[N], Euclidean."""
    method: str
    recall: float
    """Share of the true k nearest that were found, on ``SAMPLE`` rows; 1 where exact."""


class View:
    """Some rows of a matrix as a matrix of their own, copied block by block and never as a whole."""

    def __init__(self, vectors: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.vectors = vectors
        self.rows = np.arange(len(vectors)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: Any) -> np.ndarray:
        return np.ascontiguousarray(self.vectors[self.rows[places]], dtype=np.float32)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Places of the rows, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))


def kth_distance(
    vectors: np.ndarray,
    k: int,
    *,
    seed: int,
    rows: np.ndarray | None = None,
    method: Method = "auto",
    exact_limit: int = EXACT_LIMIT,
) -> Neighbours:
    """Distance of each row to its k-th nearest other row.

    Args:
        vectors: [N, D], unit length.
        k: at least 1; N - 1 where there are fewer others.
        seed: of the index and of the rows on which its recall is measured.
        rows: those of ``vectors`` that the set consists of; all where absent.
        method: ``auto`` is exact up to ``exact_limit`` rows and an inverted file beyond, which gives the same answer
            under the same seed; a graph that several threads build does not.
        exact_limit: see ``method``.

    Raises:
        EnvironmentProblem: an index is needed and faiss is not installed.
        ValueError: fewer than two vectors.
    """
    view = View(vectors, rows)
    if len(view) < 2:
        raise ValueError("kth_distance needs at least two vectors")
    k = min(k, len(view) - 1)
    if method == "exact" or (method == "auto" and len(view) <= exact_limit):
        return Neighbours(_exact(view, np.arange(len(view)), k)[0], "exact", 1.0)
    return _approximate(view, k, seed, "ivf" if method == "auto" else method)


def _exact(view: View, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the k-th neighbour and the k neighbours [R, k] of ``rows``."""
    distance, indices = np.empty(len(rows)), np.empty((len(rows), k), dtype=np.int64)
    starts = range(0, len(rows), BLOCK)
    for start in progress(starts, what="exact neighbours", total=len(starts), unit="blocks"):
        part = rows[start : start + BLOCK]
        values, nearest = _nearest_in_blocks(view, part, k)
        distance[start : start + len(part)] = _farthest(view, part, nearest, values)
        indices[start : start + len(part)] = nearest
    return distance, indices


def _nearest_in_blocks(view: View, part: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and places [P, k] of the nearest others of the rows ``part``, by a pass over all rows."""
    queries = view[part]
    best = np.full((len(part), k), -np.inf, dtype=np.float32)
    places = np.zeros((len(part), k), dtype=np.int64)
    for block in view.blocks(ADD_BLOCK):
        similarity = queries @ view[block].T
        own = (part >= block[0]) & (part <= block[-1])
        similarity[np.flatnonzero(own), part[own] - block[0]] = -np.inf
        top = np.argpartition(similarity, -min(k, len(block)), axis=1)[:, -min(k, len(block)) :]
        values = np.concatenate([best, np.take_along_axis(similarity, top, axis=1)], axis=1)
        where = np.concatenate([places, block[top]], axis=1)
        kept = np.argpartition(values, -k, axis=1)[:, -k:]
        best, places = np.take_along_axis(values, kept, axis=1), np.take_along_axis(where, kept, axis=1)
    return best, places


def _approximate(view: View, k: int, seed: int, method: str) -> Neighbours:
    try:
        import faiss
    except ImportError:
        raise EnvironmentProblem(
            f"neighbours of {len(view)} vectors need faiss",
            code="package-missing",
            hint="pip install 'margin-align[filter]'",
        ) from None
    index, label = (_graph if method == "hnsw" else _inverted_file)(faiss, view, seed)
    sample = np.random.default_rng(seed).choice(len(view), min(SAMPLE, len(view)), replace=False)
    _, truth = _exact(view, sample, k)
    recall, effort = _tune(index, view, sample, truth, k, method)
    distance = np.empty(len(view))
    order = np.arange(len(view)) if method == "hnsw" else _by_list(faiss, index)
    blocks = np.array_split(order, math.ceil(len(view) / (8 * BLOCK)))
    for rows in progress(blocks, what="neighbours", total=len(blocks), unit="blocks"):
        distance[rows], _ = _search(index, view, rows, k)
    return Neighbours(distance, f"{label}, {effort}", recall)


def _inverted_file(faiss: Any, view: View, seed: int) -> tuple[Any, str]:
    """Lists around cluster centres; trained on ``POINTS_PER_LIST`` vectors a list."""
    size, lists = view.vectors.shape[1], max(1, int(4 * math.sqrt(len(view))))
    quantizer = faiss.IndexFlatIP(size)
    index = faiss.IndexIVFFlat(quantizer, size, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter = seed, TRAINING_ROUNDS
    drawn = np.random.default_rng(seed).choice(len(view), min(len(view), POINTS_PER_LIST * lists), replace=False)
    index.train(view[np.sort(drawn)])
    _add(index, view)
    return index, f"inverted file of {lists} lists"


def _by_list(faiss: Any, index: Any) -> np.ndarray:
    """All rows, those of one list together, so that a block of queries finds its lists in the processor's cache."""
    lists = index.invlists
    found = [faiss.rev_swig_ptr(lists.get_ids(k), lists.list_size(k)).copy() for k in range(index.nlist)]
    return np.concatenate(found)


def _graph(faiss: Any, view: View, seed: int) -> tuple[Any, str]:
    """Hierarchical navigable small world graph (Malkov and Yashunin, arXiv 1603.09320)."""
    index = faiss.IndexHNSWFlat(view.vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    _add(index, view)
    return index, f"HNSW graph of {LINKS} links"


def _add(index: Any, view: View) -> None:
    blocks = list(view.blocks(ADD_BLOCK))
    for block in progress(blocks, what="index", total=len(blocks), unit="blocks"):
        index.add(view[block])


def _tune(index: Any, view: View, sample: np.ndarray, truth: np.ndarray, k: int, method: str) -> tuple[float, str]:
    """Raise the search effort until the recall on ``sample`` is ``WANTED_RECALL``; (recall, effort in words)."""
    effort = FIRST_EF if method == "hnsw" else FIRST_PROBES
    while True:
        if method == "hnsw":
            index.hnsw.efSearch = effort
        else:
            index.nprobe = effort
        _, found = _search(index, view, sample, k)
        recall = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(truth, found, strict=True)]))
        most = 4096 if method == "hnsw" else index.nlist
        words = f"{effort} candidates" if method == "hnsw" else f"{effort} probed"
        log.debug("%s: recall %.3f", words, recall)
        if recall >= WANTED_RECALL or effort >= most:
            return recall, words
        effort = min(most, math.ceil(1.5 * effort))


def _search(index: Any, view: View, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the k-th neighbour and the neighbours [R, k]; a row is not its own neighbour."""
    similarity, indices = index.search(view[rows], k + 1)
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True
    values, nearest = similarity[~own].reshape(len(rows), k), indices[~own].reshape(len(rows), k)
    values = np.where(nearest < 0, np.inf, values)
    return _farthest(view, rows, nearest, values), nearest


def _farthest(view: View, rows: np.ndarray, nearest: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Distance [R] to the least similar of the neighbours, from the difference: 2 - 2 cos loses small distances."""
    last = np.take_along_axis(nearest, values.argmin(axis=1)[:, None], axis=1)[:, 0]
    found: np.ndarray = np.linalg.norm(view[rows] - view[last], axis=1).astype(np.float64)
    return found
