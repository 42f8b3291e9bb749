"""The nearest neighbours of many vectors by an inverted file of which only a share is in memory at a time.

Cluster centres are trained on a sample, and every vector is told the lists nearest to it: in the first of them it lies,
in as many of them as it takes its neighbours are looked for. The vectors are written in the order of their lists
(lists.py); one share of the lists after the other is loaded, and those that look into it are answered from it. The
best k so far are kept, which are the best k of all shares exactly. What a share answers is cut into shards
(align/sharding/shards.py): a stopped search goes on, and a cluster can share it.

Memory: 20 bytes a vector, the vectors that centres are trained on (64 for each of at most 8,192, of more one cell at a
time), and ``SHARE_BYTES`` of vectors up to three times over; in a worker of a cluster the latter only. A list is never
cut: where most vectors are equal theirs may be larger than a share, and takes the square of its length to search. On
disk, until it is done: a copy of the vectors, and for each up to 8 bytes a list, 8 a share that it looks into and 36 a
neighbour.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import ClusterSection
from align.filtering.knn.centroids import faiss, index_of, list_count, train
from align.filtering.knn.exact import exact_distance
from align.filtering.knn.ivf_lists import Listed, in_lists
from align.filtering.knn.recall import WANTED_RECALL, Sample, Trial, enough
from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import Best, farthest, nearest
from align.io.array_cache import cached_array
from align.io.console import log
from align.sharding.arrays import as_array, as_table, map_arrays
from align.sharding.jobs import Work

QUERIES = 8192
FIRST_PROBES = 8
MOST_COMPARED = 8192
"""Vectors that each is compared with, on average and at most: what more recall may cost."""


def search(
    view: View, true: Sample, *, seed: int, folder: Path, cluster: ClusterSection | None
) -> tuple[np.ndarray, str, float]:
    """Distance of each vector to the farthest of the k nearest that are found.

    Args:
        view: N vectors of unit length.
        true: as many lists are looked into as it takes to find ``WANTED_RECALL`` of its neighbours, unless that were
            more than ``MOST_COMPARED`` vectors allow.
        seed: of the training.
        folder: valid for these vectors, k and seed only.
        cluster: whose workers share the passes over the queries.

    Returns:
        Distances [N], how they were found, and the recall on the sample.

    Raises:
        EnvironmentProblem: the cluster is of no use.
    """
    centres = cached_array(folder / "centres.npy", lambda: train(view, list_count(len(view)), seed))
    count = len(centres)
    most = min(count, max(FIRST_PROBES, MOST_COMPARED * count // len(view)))
    job = Assign(centres, most)
    near = map_arrays(Vectors(view), job, folder / f"lists-{most}", what="lists", rows=QUERIES, cluster=cluster)["list"]
    trial = Trial(view, true, near, count)
    found, probes = enough(FIRST_PROBES, most, trial.recall)
    if found < WANTED_RECALL:
        log.warning(
            "neighbours: %.1f%% of the nearest are found where %.0f%% were wanted; to compare more of the %d vectors "
            "would take too long", 100 * found, 100 * WANTED_RECALL, len(view),
        )  # fmt: skip
    listed = in_lists(view, near[:, :probes], count, folder / f"by-list-{probes}")
    best = Best(folder / f"best-{probes}", len(view), true.k)
    for share in range(len(listed.starts) - 1):
        if not best.holds(share):
            table, part = listed.visitors(share), folder / f"best-{probes}-{share}"
            answers = map_arrays(table, share_of(listed, share, true.k), part, what="neighbours", rows=QUERIES,
                               cluster=cluster)  # fmt: skip
            best.add(share, table.positions, answers)
        shutil.rmtree(folder / f"best-{probes}-{share}", ignore_errors=True)
    return _distances(view, listed, best), f"inverted file of {count} lists, {probes} probed", found


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """All vectors of a view, as rows for ``align.shards``."""

    view: View

    def __len__(self) -> int:
        return len(self.view)

    def select(self, indices: range) -> Dataset:
        """Some of them as a table."""
        return as_table({"vector": self.view[slice(indices.start, indices.stop)]})


@dataclass(frozen=True, slots=True, eq=False)
class Assign:
    """The lists nearest to vectors (a job of ``align.shards``)."""

    centres: np.ndarray
    probes: int

    def start(self) -> Work:
        """Index the centres."""
        index = index_of(self.centres, self.probes)

        def work(rows: Dataset) -> Dataset:
            _, nearest = index.search(as_array(rows, "vector"), self.probes)
            return as_table({"list": nearest.astype(np.int32)})

        return work


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The k nearest neighbours among a share of the vectors (a job of ``align.shards``)."""

    vectors: np.ndarray
    """[S, D]."""
    lists: np.ndarray
    """int64 [S], of each, counted within the share."""
    first: int
    """Position of the first."""
    count: int
    """Lists."""
    k: int

    def start(self) -> Work:
        """Put the vectors into their lists."""
        library, (number, size) = faiss(), self.vectors.shape
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
        none = (place < 0) | (place == as_array(rows, "own")[:, None])
        return as_table(nearest(np.where(none, -np.inf, similarity), np.where(none, -1, place), self.k))


def share_of(listed: Listed, share: int, k: int) -> Share:
    """The job of a share."""
    own, lists = slice(*listed.starts[share : share + 2].tolist()), listed.lists_of(share)
    inside = listed.records["list"][own, 0].astype(np.int64) - lists.start
    return Share(listed.vectors(own), inside, own.start, len(lists), k)


def _distances(view: View, listed: Listed, best: Best) -> np.ndarray:
    """Distance [N] of each vector of the view to the last of its best neighbours.

    Those that found fewer than k, in lists with hardly a vector, are compared with all.
    """
    found, few = np.empty(len(view)), []
    for block in listed.blocks():
        place, own = best.place[block], listed.records["place"][block]
        apart = listed.vectors(block) - listed.vectors(farthest(best.similarity[block], place))
        found[own] = np.linalg.norm(apart, axis=1)
        few.append(own[(place < 0).any(axis=1)])
    alone = np.concatenate(few)
    if len(alone):
        found[alone] = exact_distance(view, alone, best.place.shape[1])
    return found
