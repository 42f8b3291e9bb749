"""How many lists a search must look into: tried on a sample whose neighbours are known."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import nearest
from align.io.console import log
from align.sharding.arrays import Arrays

WANTED_RECALL = 0.97
TIE = 5e-4
"""Distances that differ by less are equal: float32 similarities do not tell them apart where they are small."""
PAIR_BYTES = 1 << 26
ROWS = 65_536


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


class Trial:
    """How well a search does on a sample, looking into more and more lists.

    Args:
        view: N vectors.
        true: the sample.
        near: [N, most], the lists of each, nearest first.
        count: of the lists.
    """

    def __init__(self, view: View, true: Sample, near: np.ndarray, count: int) -> None:
        self.view, self.true, self.near, self.count = view, true, near, count
        self.queries, self.probed, shape = view[true.rows], 0, (len(true.rows), true.k)
        self.best: Arrays = {"similarity": np.full(shape, -np.inf), "place": np.full(shape, -1)}

    def recall(self, probes: int) -> float:
        """With the nearest ``probes`` lists of each; never fewer than before."""
        asked = self.near[self.true.rows, self.probed : probes].ravel()
        who = np.repeat(np.arange(len(self.true.rows)), probes - self.probed)
        order = np.argsort(asked, kind="stable")
        for block in self._blocks(len(asked)):
            self._look(block, asked[order], who[order])
        self.probed = probes
        return self.true.recall(self.view, self.best["place"])

    def _blocks(self, asked: int) -> Iterator[np.ndarray]:
        """Rows of which about ``PAIR_BYTES`` of pairs of a vector and a query are compared."""
        pairs = max(1, PAIR_BYTES // (4 * self.view.size)) * self.count // max(1, asked)
        return self.view.blocks(max(1, min(ROWS, pairs)))

    def _look(self, block: np.ndarray, asked: np.ndarray, who: np.ndarray) -> None:
        """Compare the vectors of a block with those of the sample that look into their lists (``asked`` ascending)."""
        own = self.near[block, 0]
        low, high = np.searchsorted(asked, own, "left"), np.searchsorted(asked, own, "right")
        times = high - low
        if len(block) > 1 and times.sum() > PAIR_BYTES // (4 * self.view.size):
            for half in np.array_split(block, 2):
                self._look(half, asked, who)
            return
        rows = np.repeat(np.arange(len(block)), times)
        query = who[np.arange(len(rows)) + np.repeat(low - np.cumsum(times) + times, times)]
        other = block[rows] != self.true.rows[query]
        rows, query = rows[other], query[other]
        if not len(rows):
            return
        used, rows = np.unique(rows, return_inverse=True)
        similarity = np.einsum("pd,pd->p", self.view[block[used]][rows], self.queries[query])
        order = np.lexsort((-similarity, query))
        query, similarity, place = query[order], similarity[order], block[used][rows[order]]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        top, shape = rank < self.true.k, self.best["place"].shape
        found: Arrays = {"similarity": np.full(shape, -np.inf), "place": np.full(shape, -1)}
        found["similarity"][query[top], rank[top]] = similarity[top]
        found["place"][query[top], rank[top]] = place[top]
        both = {name: np.concatenate([self.best[name], found[name]], axis=1) for name in found}
        self.best = nearest(both["similarity"], both["place"], self.true.k)


def enough(first: int, most: int, recall_of: Callable[[int], float]) -> tuple[float, int]:
    """Raise the effort of a search from ``first`` on until its recall is ``WANTED_RECALL``; (recall, effort)."""
    effort = min(first, most)
    while (found := recall_of(effort)) < WANTED_RECALL and effort < most:
        log.debug("effort %d: recall %.3f", effort, found)
        effort = min(most, math.ceil(1.5 * effort))
    return found, effort
