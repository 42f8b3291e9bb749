"""The lists of an inverted file: how many, where their centres lie, and which are nearest to a vector."""

import math
from typing import Any

import numpy as np

from align.errors import EnvironmentProblem
from align.filtering.knn.row_view import View

LIST_LENGTH = 250
"""Of large sets, on average; sets below (4 x 250)^2 have 4 sqrt(N) lists."""
POINTS_PER_LIST = 64
POINTS_PER_CENTRE = 256
TRAINING_ROUNDS = 8
FLAT_CENTRES = 8192
"""Of more centres the nearest are looked up in a graph, and they are trained in two levels."""
GRAPH_LINKS, GRAPH_EFFORT = 32, 80
LAST_HALF, POWERS = 8, 8
TRAINED_BLOCK = 8192


def list_count(count: int) -> int:
    """Lists for so many vectors."""
    return min(count, max(1, int(4 * math.sqrt(count)), count // LIST_LENGTH))


def train(view: View, count: int, seed: int) -> np.ndarray:
    """About ``count`` centres, [C, D], trained on ``POINTS_PER_LIST`` vectors a list.

    Many are trained in two levels: a few, and as many within each as it has of the vectors, of which those of one are
    in memory at a time.
    """
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(view), min(len(view), POINTS_PER_LIST * count), replace=False))
    if count <= FLAT_CENTRES:
        return _lined_up(_kmeans(view[drawn], count, seed))
    few = math.isqrt(count)
    upper = _kmeans(view[rng.choice(drawn, min(len(drawn), POINTS_PER_CENTRE * few), replace=False)], few, seed)
    index, parts = index_of(upper, 1), range(0, len(drawn), TRAINED_BLOCK)
    cell = np.concatenate([index.search(view[drawn[start : start + TRAINED_BLOCK]], 1)[1][:, 0] for start in parts])
    sizes = np.bincount(cell, minlength=few)
    return _lined_up(np.concatenate([
        _kmeans(view[drawn[cell == number]], max(1, count * size // len(drawn)), seed)
        for number, size in enumerate(sizes.tolist()) if size
    ]))  # fmt: skip


def _lined_up(centres: np.ndarray) -> np.ndarray:
    """The centres [C, D] in an order in which near ones have near numbers.

    They are halved along the direction in which they differ most, found by the power method, and so are the halves.
    """

    def order(rows: np.ndarray) -> np.ndarray:
        if len(rows) <= LAST_HALF:
            return rows
        apart = centres[rows] - centres[rows].mean(axis=0)
        direction = apart[np.argmax(np.square(apart).sum(axis=1))]
        for _ in range(POWERS):
            direction = apart.T @ (apart @ direction)
            direction /= np.linalg.norm(direction) or 1.0
        rows, half = rows[np.argsort(apart @ direction, kind="stable")], len(rows) // 2
        return np.concatenate([order(rows[:half]), order(rows[half:])])

    return centres[order(np.arange(len(centres)))]


def _kmeans(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres [count, D] of points [P, D], of which at most ``POINTS_PER_CENTRE`` a centre are looked at."""
    kmeans = faiss().Kmeans(
        points.shape[1], count, niter=TRAINING_ROUNDS, seed=seed, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTRE,
    )  # fmt: skip
    kmeans.train(points)
    found: np.ndarray = kmeans.centroids
    return found


def index_of(centres: np.ndarray, probes: int) -> Any:
    """Finds the nearest of many vectors: all are compared, or a graph is followed, built by one thread and so always
    the same."""
    library, size = faiss(), centres.shape[1]
    index = library.IndexFlatIP(size)
    if len(centres) > FLAT_CENTRES:
        index = library.IndexHNSWFlat(size, GRAPH_LINKS, library.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = GRAPH_EFFORT
        index.hnsw.efSearch = 2 * probes
    threads = library.omp_get_max_threads()
    library.omp_set_num_threads(1)
    index.add(centres)
    library.omp_set_num_threads(threads)
    return index


def faiss() -> Any:
    """The library of the index.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import faiss as found
    except ImportError:
        raise EnvironmentProblem(
            "neighbours of so many vectors need faiss",
            code="package-missing",
            hint="pip install 'margin-align[filter]'",
        ) from None
    return found
