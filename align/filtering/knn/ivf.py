"""Nearest neighbors of many vectors by an inverted file (IVF) of which only a share is in memory at a time.

Centroids are trained on a sample, and every vector is assigned to the lists of its nearest centroids: it is stored in
the first and probes as many of them as the recall takes. The vectors are written in the order of their lists
(ivf_lists.py); one share of the lists after the other is loaded and answers the vectors that probe it. The top-k of all
shares are merged exactly. The answers of a share are cut into shards (align/sharding/shards.py), so a stopped search
resumes and a cluster can share it.

Memory: 20 bytes a vector, the training vectors (64 for each of at most 8,192 centroids; beyond, those of one cell at a
time), and ``SHARE_BYTES`` of vectors up to three times over; a worker of a cluster needs the latter only. A list is
never cut: if most vectors are equal, their list may exceed a share, and its search takes the square of its length. Disk
until it is done: a copy of the vectors, and for each up to 8 bytes a list, 8 a share that it probes and 36 a neighbor.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import ClusterSection
from align.filtering.knn.centroids import centroid_index, import_faiss, list_count, train_centroids
from align.filtering.knn.exact import exact_distance
from align.filtering.knn.ivf_lists import InvertedLists, write_inverted_lists
from align.filtering.knn.recall import WANTED_RECALL, GroundTruth, ProbeRecall, tune_effort
from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import TopK, kth_neighbor, top_k_of_rows
from align.io.array_cache import cached_array
from align.io.console import log
from align.sharding.arrays import as_array, as_table, map_arrays
from align.sharding.jobs import Work

QUERIES = 8192
FIRST_PROBES = 8
MOST_COMPARED = 8192
"""Largest mean number of vectors that a vector is compared with: the cost at which the search for recall stops."""


def ivf_distance(
    view: View, truth: GroundTruth, *, seed: int, folder: Path, cluster: ClusterSection | None
) -> tuple[np.ndarray, str, float]:
    """Distance of each vector to the k-th nearest neighbor that an inverted file finds.

    Args:
        view: N vectors of unit length.
        truth: sample for the recall. As many lists are probed as reach ``WANTED_RECALL`` on it, unless a vector were
            compared with more than ``MOST_COMPARED`` others on average.
        seed: seed of the training.
        folder: valid for these vectors, k and seed only.
        cluster: its workers share the passes over the queries.

    Returns:
        Distances [N], the method in words, and the recall on the sample.

    Raises:
        EnvironmentProblem: the cluster cannot be used.
    """
    centroids = cached_array(folder / "centres.npy", lambda: train_centroids(view, list_count(len(view)), seed))
    count = len(centroids)
    most = min(count, max(FIRST_PROBES, MOST_COMPARED * count // len(view)))
    job, part = AssignLists(centroids, most), folder / f"lists-{most}"
    near = map_arrays(VectorRows(view), job, part, what="lists", rows=QUERIES, cluster=cluster)["list"]
    recall, probes = tune_effort(FIRST_PROBES, most, ProbeRecall(view, truth, near, count).recall)
    if recall < WANTED_RECALL:
        log.warning(
            "nearest neighbors: recall %.1f%%, expected %.0f%%; comparing more of the %d vectors would take too long",
            100 * recall, 100 * WANTED_RECALL, len(view),
        )  # fmt: skip
    lists = write_inverted_lists(view, near[:, :probes], count, folder / f"by-list-{probes}")
    top_k = TopK(folder / f"best-{probes}", len(view), truth.k)
    for share in range(len(lists.starts) - 1):
        part = folder / f"best-{probes}-{share}"
        if not top_k.holds(share):
            queries, search = lists.queries(share), share_search(lists, share, truth.k)
            answers = map_arrays(queries, search, part, what="nearest neighbors", rows=QUERIES, cluster=cluster)
            top_k.merge(share, queries.positions, answers)
        shutil.rmtree(part, ignore_errors=True)
    return _distances(view, lists, top_k), f"inverted file of {count} lists, {probes} probed", recall


@dataclass(frozen=True, slots=True, eq=False)
class VectorRows:
    """All vectors of a view, as rows of a sharded job (align/sharding/jobs.py)."""

    view: View

    def __len__(self) -> int:
        return len(self.view)

    def select(self, indices: range) -> Dataset:
        """Some vectors as a table."""
        return as_table({"vector": self.view[slice(indices.start, indices.stop)]})


@dataclass(frozen=True, slots=True, eq=False)
class AssignLists:
    """Job that assigns vectors to the lists of their nearest centroids."""

    centroids: np.ndarray
    """[C, D]."""
    probes: int

    def start(self) -> Work:
        """Index the centroids."""
        index = centroid_index(self.centroids, self.probes)

        def work(rows: Dataset) -> Dataset:
            _, nearest = index.search(as_array(rows, "vector"), self.probes)
            return as_table({"list": nearest.astype(np.int32)})

        return work


@dataclass(frozen=True, slots=True, eq=False)
class ShareSearch:
    """Job that finds the top-k neighbors among a share of the vectors."""

    vectors: np.ndarray
    """[S, D]."""
    lists: np.ndarray
    """int64 [S], the list of each vector, numbered within the share."""
    first: int
    """Position of the first vector."""
    count: int
    """Number of lists."""
    k: int

    def start(self) -> Work:
        """Put the vectors into an IVF index."""
        library, (number, size) = import_faiss(), self.vectors.shape
        flat = library.IndexFlatIP(size)
        index = library.IndexIVFFlat(flat, size, self.count, library.METRIC_INNER_PRODUCT)
        index.is_trained = True
        positions = np.arange(self.first, self.first + number)
        index.add_core(number, *map(library.swig_ptr, (self.vectors, positions, self.lists)))
        return lambda rows: self._work(index, rows)

    def _work(self, index: Any, rows: Dataset) -> Dataset:
        lists = as_array(rows, "list").astype(np.int64)
        index.nprobe = lists.shape[1]
        unused = np.zeros(lists.shape, dtype=np.float32)
        similarity, place = index.search_preassigned(as_array(rows, "vector"), self.k + 1, lists, unused)
        invalid = (place < 0) | (place == as_array(rows, "own")[:, None])
        return as_table(top_k_of_rows(np.where(invalid, -np.inf, similarity), np.where(invalid, -1, place), self.k))


def share_search(inverted: InvertedLists, share: int, k: int) -> ShareSearch:
    """The job that searches a share."""
    positions, lists = slice(*inverted.starts[share : share + 2].tolist()), inverted.lists_of(share)
    inside = inverted.records["list"][positions, 0].astype(np.int64) - lists.start
    return ShareSearch(inverted.vectors(positions), inside, positions.start, len(lists), k)


def _distances(view: View, lists: InvertedLists, top_k: TopK) -> np.ndarray:
    """Distance [N] of each vector of the view to its k-th nearest neighbor.

    A vector that found fewer than k, because its lists are nearly empty, is searched exactly.
    """
    distance, few = np.empty(len(view)), []
    for block in lists.blocks():
        neighbors, place = top_k.place[block], lists.records["place"][block]
        difference = lists.vectors(block) - lists.vectors(kth_neighbor(top_k.similarity[block], neighbors))
        distance[place] = np.linalg.norm(difference, axis=1)
        few.append(place[(neighbors < 0).any(axis=1)])
    incomplete = np.concatenate(few)
    if len(incomplete):
        distance[incomplete] = exact_distance(view, incomplete, top_k.place.shape[1])
    return distance
