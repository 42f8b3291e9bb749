"""Centroids of an inverted file (IVF): how many lists there are, k-means training, and the search for the nearest."""

import math
from typing import Any

import numpy as np

from align.errors import EnvironmentProblem
from align.filtering.knn.row_view import View

LIST_LENGTH = 250
"""Mean length of the lists of large sets; sets below (4 x 250)^2 have 4 sqrt(N) lists."""
POINTS_PER_LIST = 64
POINTS_PER_CENTROID = 256
KMEANS_ITERATIONS = 8
FLAT_CENTROIDS = 8192
"""More centroids are trained in two levels, and the nearest are found in an HNSW graph."""
GRAPH_LINKS, GRAPH_EFFORT = 32, 80
SMALLEST_SPLIT, POWER_ITERATIONS = 8, 8
ASSIGNED_BLOCK = 8192


def list_count(count: int) -> int:
    """Number of lists for ``count`` vectors."""
    return min(count, max(1, int(4 * math.sqrt(count)), count // LIST_LENGTH))


def train_centroids(view: View, count: int, seed: int) -> np.ndarray:
    """Train about ``count`` centroids, [C, D], by spherical k-means on ``POINTS_PER_LIST`` vectors per list.

    More than ``FLAT_CENTROIDS`` are trained in two levels: sqrt(count) coarse centroids, then within each coarse cell a
    number in proportion to its vectors. The vectors of one cell are in memory at a time.
    """
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(view), min(len(view), POINTS_PER_LIST * count), replace=False))
    if count <= FLAT_CENTROIDS:
        return _in_spatial_order(_kmeans(view[drawn], count, seed))
    few = math.isqrt(count)
    coarse = _kmeans(view[rng.choice(drawn, min(len(drawn), POINTS_PER_CENTROID * few), replace=False)], few, seed)
    index, parts = centroid_index(coarse, 1), range(0, len(drawn), ASSIGNED_BLOCK)
    cell = np.concatenate([index.search(view[drawn[start : start + ASSIGNED_BLOCK]], 1)[1][:, 0] for start in parts])
    sizes = np.bincount(cell, minlength=few)
    return _in_spatial_order(np.concatenate([
        _kmeans(view[drawn[cell == number]], max(1, count * size // len(drawn)), seed)
        for number, size in enumerate(sizes.tolist()) if size
    ]))  # fmt: skip


def _in_spatial_order(centroids: np.ndarray) -> np.ndarray:
    """Order centroids [C, D] so that near ones have near numbers.

    They are split at the median of their first principal component, found by power iteration, and so are the halves.
    """

    def order(rows: np.ndarray) -> np.ndarray:
        if len(rows) <= SMALLEST_SPLIT:
            return rows
        centered = centroids[rows] - centroids[rows].mean(axis=0)
        direction = centered[np.argmax(np.square(centered).sum(axis=1))]
        for _ in range(POWER_ITERATIONS):
            direction = centered.T @ (centered @ direction)
            direction /= np.linalg.norm(direction) or 1.0
        rows, half = rows[np.argsort(centered @ direction, kind="stable")], len(rows) // 2
        return np.concatenate([order(rows[:half]), order(rows[half:])])

    return centroids[order(np.arange(len(centroids)))]


def _kmeans(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centroids [count, D] of points [P, D], from at most ``POINTS_PER_CENTROID`` points per centroid."""
    kmeans = import_faiss().Kmeans(
        points.shape[1], count, niter=KMEANS_ITERATIONS, seed=seed, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
    )  # fmt: skip
    kmeans.train(points)
    centroids: np.ndarray = kmeans.centroids
    return centroids


def centroid_index(centroids: np.ndarray, probes: int) -> Any:
    """faiss index of the centroids: flat, or an HNSW graph, built by one thread so that it is always the same."""
    library, size = import_faiss(), centroids.shape[1]
    index = library.IndexFlatIP(size)
    if len(centroids) > FLAT_CENTROIDS:
        index = library.IndexHNSWFlat(size, GRAPH_LINKS, library.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = GRAPH_EFFORT
        index.hnsw.efSearch = 2 * probes
    threads = library.omp_get_max_threads()
    library.omp_set_num_threads(1)
    index.add(centroids)
    library.omp_set_num_threads(threads)
    return index


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise EnvironmentProblem(
            "nearest neighbors of so many vectors need faiss",
            code="package-missing",
            hint="pip install 'margin-align[filter]'",
        ) from None
    return faiss
