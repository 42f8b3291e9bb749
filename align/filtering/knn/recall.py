"""Recall of an approximate search on a sample whose exact neighbors are known, and the effort that it takes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import top_k_of_rows
from align.io.console import log
from align.sharding.arrays import Arrays

WANTED_RECALL = 0.97
TIE = 5e-4
"""Distances that differ by less count as equal: float32 similarities do not resolve small distances."""
PAIR_BYTES = 1 << 26
"""Bytes of vectors that are compared with queries at a time."""
ROWS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """Rows of a sample and the exact distances to their k-th nearest neighbors."""

    rows: np.ndarray
    """[S]."""
    k: int
    distance: np.ndarray
    """[S], to the k-th."""

    def recall(self, view: View, place: np.ndarray) -> float:
        """Share of the neighbors found, [S, k], that are no farther than the true k-th; ties count as found."""
        pairs = np.repeat(self.rows, self.k), np.maximum(place, 0).ravel()
        near = view.distances(*pairs).reshape(place.shape) <= self.distance[:, None] + TIE
        return float((near & (place >= 0)).mean())


class ProbeRecall:
    """Recall of an inverted file on a sample, for an increasing number of probed lists.

    Args:
        view: N vectors.
        truth: the sample.
        near: [N, max_probes], the lists that each vector probes, nearest first; it is stored in the first.
        count: number of lists.
    """

    def __init__(self, view: View, truth: GroundTruth, near: np.ndarray, count: int) -> None:
        self.view, self.truth, self.near, self.count = view, truth, near, count
        self.queries, self.probed, shape = view[truth.rows], 0, (len(truth.rows), truth.k)
        self.best: Arrays = {"similarity": np.full(shape, -np.inf), "place": np.full(shape, -1)}

    def recall(self, probes: int) -> float:
        """Recall with the nearest ``probes`` lists of each query; never fewer than in the call before."""
        lists = self.near[self.truth.rows, self.probed : probes].ravel()
        queries = np.repeat(np.arange(len(self.truth.rows)), probes - self.probed)
        order = np.argsort(lists, kind="stable")
        for block in self._blocks(len(lists)):
            self._compare(block, lists[order], queries[order])
        self.probed = probes
        return self.truth.recall(self.view, self.best["place"])

    def _blocks(self, probed: int) -> Iterator[np.ndarray]:
        """Blocks of rows with about ``PAIR_BYTES`` of pairs of a vector and a query."""
        pairs = max(1, PAIR_BYTES // (4 * self.view.size)) * self.count // max(1, probed)
        return self.view.blocks(max(1, min(ROWS, pairs)))

    def _compare(self, block: np.ndarray, lists: np.ndarray, queries: np.ndarray) -> None:
        """Compare the vectors of a block with the queries that probe their lists.

        Args:
            block: rows of the view.
            lists: lists that are probed, ascending.
            queries: the query of each of ``lists``.
        """
        stored = self.near[block, 0]
        low, high = np.searchsorted(lists, stored, "left"), np.searchsorted(lists, stored, "right")
        times = high - low
        if len(block) > 1 and times.sum() > PAIR_BYTES // (4 * self.view.size):
            for half in np.array_split(block, 2):
                self._compare(half, lists, queries)
            return
        rows = np.repeat(np.arange(len(block)), times)
        query = queries[np.arange(len(rows)) + np.repeat(low - np.cumsum(times) + times, times)]
        other = block[rows] != self.truth.rows[query]
        rows, query = rows[other], query[other]
        if not len(rows):
            return
        used, rows = np.unique(rows, return_inverse=True)
        similarity = np.einsum("pd,pd->p", self.view[block[used]][rows], self.queries[query])
        order = np.lexsort((-similarity, query))
        query, similarity, place = query[order], similarity[order], block[used][rows[order]]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        top, shape = rank < self.truth.k, self.best["place"].shape
        new: Arrays = {"similarity": np.full(shape, -np.inf), "place": np.full(shape, -1)}
        new["similarity"][query[top], rank[top]] = similarity[top]
        new["place"][query[top], rank[top]] = place[top]
        both = {name: np.concatenate([self.best[name], new[name]], axis=1) for name in new}
        self.best = top_k_of_rows(both["similarity"], both["place"], self.truth.k)


def tune_effort(first: int, most: int, recall_of: Callable[[int], float]) -> tuple[float, int]:
    """Raise the effort of a search from ``first`` to at most ``most`` until its recall is ``WANTED_RECALL``.

    Args:
        first: effort to start with: probed lists, or candidates of a graph (faiss's ``nprobe``, ``efSearch``).
        most: largest effort.
        recall_of: recall of the search at an effort.

    Returns:
        Recall and effort.
    """
    effort = min(first, most)
    while (recall := recall_of(effort)) < WANTED_RECALL and effort < most:
        log.debug("effort %d: recall %.3f", effort, recall)
        effort = min(most, math.ceil(1.5 * effort))
    return recall, effort
