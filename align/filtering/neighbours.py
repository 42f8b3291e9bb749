"""Distance of every vector to its k-th nearest neighbour: exact for small sets, an inverted file beyond.

Memory beside the vectors: ``BLOCK`` x N similarities when exact, one copy of the vectors in the index beyond.
"""

import math
from dataclasses import dataclass

import numpy as np

from align.console import progress
from align.errors import EnvironmentProblem

EXACT_LIMIT = 20_000
BLOCK = 1024
PROBES = 24
SAMPLE = 500


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Distances to the k-th neighbour and how they were found."""

    distance: np.ndarray
    """[N], Euclidean."""
    method: str
    recall: float
    """Share of the true k nearest that were found, on ``SAMPLE`` rows; 1 where exact."""


def kth_distance(vectors: np.ndarray, k: int, *, seed: int, exact_limit: int = EXACT_LIMIT) -> Neighbours:
    """Distance of each row to its k-th nearest other row.

    Args:
        vectors: [N, D], unit length.
        k: at least 1; N - 1 where there are fewer others.
        seed: of the index and of the rows on which its recall is measured.
        exact_limit: N above which an inverted file is used.

    Raises:
        EnvironmentProblem: the set is large and faiss is not installed.
        ValueError: fewer than two vectors.
    """
    if len(vectors) < 2:
        raise ValueError("kth_distance needs at least two vectors")
    k = min(k, len(vectors) - 1)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if len(vectors) <= exact_limit:
        return Neighbours(_exact(vectors, np.arange(len(vectors)), k)[0], "exact", 1.0)
    return _inverted_file(vectors, k, seed)


def _exact(vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the k-th neighbour and the k neighbours [R, k] of ``rows``."""
    distance, indices = np.empty(len(rows)), np.empty((len(rows), k), dtype=np.int64)
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        similarity = vectors[part] @ vectors.T
        similarity[np.arange(len(part)), part] = -np.inf
        nearest = np.argpartition(similarity, -k, axis=1)[:, -k:]
        values = np.take_along_axis(similarity, nearest, axis=1)
        distance[start : start + len(part)] = _farthest(vectors, part, nearest, values)
        indices[start : start + len(part)] = nearest
    return distance, indices


def _inverted_file(vectors: np.ndarray, k: int, seed: int) -> Neighbours:
    try:
        import faiss
    except ImportError:
        raise EnvironmentProblem(
            f"neighbours of {len(vectors)} vectors need faiss",
            code="package-missing",
            hint="pip install 'margin-align[filter]'",
        ) from None
    lists = int(4 * math.sqrt(len(vectors)))
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.max_points_per_centroid = 64
    index.train(vectors)
    index.add(vectors)
    index.nprobe = PROBES
    distance = np.empty(len(vectors))
    starts = range(0, len(vectors), 8 * BLOCK)
    for start in progress(starts, what="neighbours", total=len(starts), unit="blocks"):
        rows = np.arange(start, min(start + 8 * BLOCK, len(vectors)))
        distance[rows], _ = _search(index, vectors, rows, k)
    sample = np.random.default_rng(seed).choice(len(vectors), SAMPLE, replace=False)
    _, truth = _exact(vectors, sample, k)
    _, found = _search(index, vectors, sample, k)
    recall = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(truth, found, strict=True)])
    return Neighbours(distance, f"IVF, {lists} lists, {PROBES} probed", float(recall))


def _search(index: object, vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the k-th neighbour and the neighbours [R, k]; a row is not its own neighbour."""
    similarity, indices = index.search(vectors[rows], k + 1)  # type: ignore[attr-defined]
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True
    values, nearest = similarity[~own].reshape(len(rows), k), indices[~own].reshape(len(rows), k)
    return _farthest(vectors, rows, nearest, values), nearest


def _farthest(vectors: np.ndarray, rows: np.ndarray, nearest: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Distance [R] to the least similar of the neighbours, from the difference: 2 - 2 cos loses small distances."""
    last = np.take_along_axis(nearest, values.argmin(axis=1)[:, None], axis=1)[:, 0]
    found: np.ndarray = np.linalg.norm(vectors[rows] - vectors[last], axis=1).astype(np.float64)
    return found
