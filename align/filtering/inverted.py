"""The nearest neighbours of many vectors by an inverted file of which only a share is in memory at a time.

Cluster centres are trained on a sample, and every vector is told the lists nearest to it: in the first of them it lies,
in as many of them as it takes its neighbours are looked for. Then one share of the vectors after the other is put into
its lists, all queries are answered from it, and the best k so far are kept, which are the best k of all shares exactly.
Each pass over the queries is cut into shards (align/shards.py): a stopped search goes on, and a cluster can share it.

Memory: 20 bytes a vector, and ``SHARE_BYTES`` of vectors up to three times over; in a worker of a cluster the latter
only. On disk: 4 bytes a list and 12 a neighbour for each vector.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.arrays import kept_array
from align.config import ClusterConfig
from align.console import log
from align.errors import EnvironmentProblem
from align.filtering.parts import COLUMNS, Arrays, as_array, as_table, found_of
from align.filtering.view import View
from align.shards import Work

SHARE_BYTES = 1 << 28
QUERIES = 8192
BEST = "best-"
WANTED_RECALL = 0.97
TIE = 5e-4
"""Distances that differ by less are equal: float32 similarities do not tell them apart where they are small."""
FIRST_PROBES = 8
MOST_COMPARED = 8192
"""Vectors that each is compared with, on average and at most: what more recall may cost."""
LIST_LENGTH = 250
"""Of large sets, on average; sets below (4 x 250)^2 have 4 sqrt(N) lists."""
POINTS_PER_LIST = 64
POINTS_PER_CENTRE = 256
TRAINING_ROUNDS = 8
FLAT_CENTRES = 8192
"""Of more centres the nearest are looked up in a graph, and they are trained in two levels."""
GRAPH_LINKS, GRAPH_EFFORT = 32, 80


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Rows whose k-th neighbours are known, to measure a search by."""

    rows: np.ndarray
    """[S]."""
    k: int
    distance: np.ndarray
    """[S], to the k-th."""

    def recall(self, view: View, place: np.ndarray) -> float:
        """Share of the neighbours found, [S, k], that are no farther than the true k-th; of equals any will do."""
        pairs = np.repeat(self.rows, self.k), np.maximum(place, 0).ravel()
        near = view.distances(*pairs).reshape(place.shape) <= self.distance[:, None] + TIE
        return float((near & (place >= 0)).mean())


def search(
    view: View, true: Sample, *, seed: int, folder: Path, cluster: ClusterConfig | None
) -> tuple[np.ndarray, str, float]:
    """A k-nearest neighbour of each vector that is the farthest of the k found.

    Args:
        view: N vectors of unit length.
        true: as many lists are looked into as it takes to find ``WANTED_RECALL`` of its neighbours, unless that were
            more than ``MOST_COMPARED`` vectors allow.
        seed: of the training.
        folder: valid for these vectors, k and seed only.
        cluster: whose workers share the passes over the queries.

    Returns:
        Places [N], how they were found, and the recall on the sample.

    Raises:
        EnvironmentProblem: the cluster is of no use.
    """
    centres = kept_array(folder / "centres.npy", lambda: _train(view, _list_count(len(view)), seed))
    count = len(centres)
    most = min(count, max(FIRST_PROBES, MOST_COMPARED * count // len(view)))
    table, job = Queries(view, np.arange(len(view))), Assign(centres, most)
    near = found_of(table, job, folder / f"lists-{most}", what="lists", rows=QUERIES, cluster=cluster)["list"]
    first = near[:, 0]
    found, probes = _tune(view, true, near, count)
    if found < WANTED_RECALL:
        log.warning(
            "neighbours: %.1f%% of the nearest are found where %.0f%% were wanted; to compare more of the %d vectors "
            "would take too long", 100 * found, 100 * WANTED_RECALL, len(view),
        )  # fmt: skip
    order = _by_list(view, first)
    best: Arrays = {}
    for stop in _stops(view, folder):
        share = _share(view, first, stop, count, true.k)
        table = Queries(view, order, lambda part: near[order[part], :probes], best)
        best = found_of(table, share, folder / f"{BEST}{stop}", what="neighbours", rows=QUERIES, cluster=cluster)
        for earlier in set(folder.glob(f"{BEST}*")) - {folder / f"{BEST}{stop}"}:
            shutil.rmtree(earlier)
    last = np.empty(len(view), dtype=np.int64)
    last[order] = farthest(best["similarity"], best["place"])
    return last, f"inverted file of {count} lists, {probes} probed", found


def farthest(similarity: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The place [N] of the least similar of each row's neighbours [N, k], of those that were found."""
    found = np.where(place < 0, np.inf, similarity)
    return np.take_along_axis(place, found.argmin(axis=1)[:, None], axis=1)[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Vectors whose neighbours are wanted, as rows for ``align.shards``."""

    view: View
    places: np.ndarray
    """[Q], in the order in which they are asked for."""
    lists: Callable[[slice], np.ndarray] | None = None
    """Lists [q, probes] to look into, for a part of the queries."""
    best: Arrays | None = None
    """``similarity`` and ``place`` [Q, k] of the best neighbours so far."""

    def __len__(self) -> int:
        return len(self.places)

    def select(self, indices: range) -> Dataset:
        """Some of them as a table."""
        part = slice(indices.start, indices.stop)
        arrays = {"vector": self.view[self.places[part]], "own": self.places[part]}
        if self.lists is not None:
            arrays["list"] = self.lists(part)
        return as_table(arrays | {name: values[part] for name, values in (self.best or {}).items()})


@dataclass(frozen=True, slots=True, eq=False)
class Assign:
    """The lists nearest to vectors (a job of ``align.shards``)."""

    centres: np.ndarray
    probes: int

    def start(self) -> Work:
        """Index the centres."""
        index = _index_of(self.centres, self.probes)

        def work(rows: Dataset) -> Dataset:
            _, nearest = index.search(as_array(rows, "vector"), self.probes)
            return as_table({"list": nearest.astype(np.int32)})

        return work


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The best k neighbours so far, with those among a share of the vectors (a job of ``align.shards``)."""

    vectors: np.ndarray
    """[S, D]."""
    lists: np.ndarray
    """[S], of each."""
    first: int
    """Place of the first."""
    count: int
    """Lists."""
    k: int

    def start(self) -> Work:
        """Put the vectors into their lists."""
        library, (number, size) = faiss(), self.vectors.shape
        flat = library.IndexFlatIP(size)
        index = library.IndexIVFFlat(flat, size, self.count, library.METRIC_INNER_PRODUCT)
        index.is_trained = True
        places, lists = np.arange(self.first, self.first + number), self.lists.astype(np.int64)
        index.add_core(number, *map(library.swig_ptr, (self.vectors, places, lists)))
        return lambda rows: self._work(index, rows)

    def _work(self, index: Any, rows: Dataset) -> Dataset:
        lists = as_array(rows, "list").astype(np.int64)
        index.nprobe = lists.shape[1]
        unused = np.zeros(lists.shape, dtype=np.float32)
        similarity, place = index.search_preassigned(as_array(rows, "vector"), self.k + 1, lists, unused)
        none = (place < 0) | (place == as_array(rows, "own")[:, None])
        similarity, place = np.where(none, -np.inf, similarity).astype(np.float32), np.where(none, -1, place)
        if "place" in rows.column_names:
            similarity = np.concatenate([as_array(rows, "similarity"), similarity], axis=1)
            place = np.concatenate([as_array(rows, "place"), place], axis=1)
        kept = np.argpartition(-similarity, self.k - 1, axis=1)[:, : self.k]
        return as_table({
            "similarity": np.take_along_axis(similarity, kept, axis=1),
            "place": np.take_along_axis(place, kept, axis=1),
        })  # fmt: skip


def _by_list(view: View, lists: np.ndarray) -> np.ndarray:
    """Places in an order in which queries of one list follow each other, which keeps it in the processor's cache.

    Only within as many vectors as a share has: these are read from the file together, wherever it lies.
    """
    return np.concatenate([block[np.argsort(lists[block], kind="stable")] for block in view.blocks(_share_size(view))])


def _stops(view: View, folder: Path | None = None) -> list[int]:
    """Where the shares end, from the last that ``folder`` holds on."""
    done = max(
        (int(place.parent.name[len(BEST) :]) for place in (folder or Path()).glob(f"{BEST}*/{COLUMNS}")), default=0
    )
    size = _share_size(view)
    return [stop for stop in (*range(size, len(view), size), len(view)) if stop >= done]


def _share(view: View, lists: np.ndarray, stop: int, count: int, k: int) -> Share:
    size = _share_size(view)
    block = np.arange((stop - 1) // size * size, stop)
    return Share(view[block], lists[block], int(block[0]), count, k)


def _share_size(view: View) -> int:
    return max(1, SHARE_BYTES // (4 * view.size))


def _list_count(count: int) -> int:
    return max(1, int(4 * math.sqrt(count)), count // LIST_LENGTH)


def _train(view: View, count: int, seed: int) -> np.ndarray:
    """About ``count`` centres, [C, D], trained on ``POINTS_PER_LIST`` vectors a list.

    Many are trained in two levels: a few, and as many within each as it has of the vectors, of which those of one are
    in memory at a time.
    """
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(view), min(len(view), POINTS_PER_LIST * count), replace=False))
    if count <= FLAT_CENTRES:
        return _kmeans(view[drawn], count, seed)
    few = math.isqrt(count)
    upper = _kmeans(view[rng.choice(drawn, min(len(drawn), POINTS_PER_CENTRE * few), replace=False)], few, seed)
    index, parts = _index_of(upper, 1), range(0, len(drawn), QUERIES)
    cell = np.concatenate([index.search(view[drawn[start : start + QUERIES]], 1)[1][:, 0] for start in parts])
    sizes = np.bincount(cell, minlength=few)
    return np.concatenate([
        _kmeans(view[drawn[cell == number]], max(1, count * size // len(drawn)), seed)
        for number, size in enumerate(sizes.tolist()) if size
    ])  # fmt: skip


def _kmeans(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres [count, D] of points [P, D], of which at most ``POINTS_PER_CENTRE`` a centre are looked at."""
    kmeans = faiss().Kmeans(
        points.shape[1], count, niter=TRAINING_ROUNDS, seed=seed, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTRE,
    )  # fmt: skip
    kmeans.train(points)
    found: np.ndarray = kmeans.centroids
    return found


def _index_of(centres: np.ndarray, probes: int) -> Any:
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


def enough(first: int, most: int, recall_of: Callable[[int], float]) -> tuple[float, int]:
    """Raise the effort of a search from ``first`` on until its recall is ``WANTED_RECALL``; (recall, effort)."""
    effort = min(first, most)
    while (found := recall_of(effort)) < WANTED_RECALL and effort < most:
        log.debug("effort %d: recall %.3f", effort, found)
        effort = min(most, math.ceil(1.5 * effort))
    return found, effort


def _tune(view: View, true: Sample, near: np.ndarray, count: int) -> tuple[float, int]:
    """Look into more of the ``near`` lists [N, most] until enough of the true neighbours are found; (recall, lists)."""
    lists, first, rows_asked = near[true.rows], near[:, 0], range(len(true.rows))

    def recall_of(probes: int) -> float:
        best: Arrays = {}
        for stop in _stops(view):
            share = _share(view, first, stop, count, true.k)
            rows = Queries(view, true.rows, lambda part: lists[part, :probes], best).select(rows_asked)
            made = share.start()(rows)
            best = {name: as_array(made, name) for name in made.column_names}
        return true.recall(view, best["place"])

    return enough(FIRST_PROBES, near.shape[1], recall_of)


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
