"""Exact nearest neighbors by brute force: for small sets, for a sample, and for vectors that an index fails on.

Memory besides the vectors: a few blocks of ``BLOCK`` x ``ADD_BLOCK`` similarities.
"""

import numpy as np
import torch

from align.filtering.knn.row_view import View
from align.filtering.knn.top_k import kth_neighbor
from align.io.console import progress

BLOCK = 512
ADD_BLOCK = 65_536


def exact_distance(view: View, rows: np.ndarray, k: int) -> np.ndarray:
    """Distance [R] of ``rows`` to their k-th nearest neighbors."""
    distance = np.empty(len(rows))
    starts = range(0, len(rows), BLOCK)
    for start in progress(starts, what="exact neighbors", total=len(starts), unit="blocks"):
        part = rows[start : start + BLOCK]
        similarity, place = _top_k_in_blocks(view, part, k)
        distance[start : start + len(part)] = view.distances(part, kth_neighbor(similarity, place))
    return distance


def _top_k_in_blocks(view: View, part: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and places [P, k] of the top-k other rows of the rows ``part``, by a pass over all rows."""
    queries = view[part]
    best = np.full((len(part), k), -np.inf, dtype=np.float32)
    places = np.zeros((len(part), k), dtype=np.int64)
    for block in view.blocks(ADD_BLOCK):
        similarity = queries @ view[block].T
        inside = (part >= block[0]) & (part <= block[-1])
        similarity[np.flatnonzero(inside), part[inside] - block[0]] = -np.inf
        top = torch.from_numpy(similarity).topk(min(k, len(block)), dim=1, sorted=False)
        values = np.concatenate([best, top.values.numpy()], axis=1)
        where = np.concatenate([places, block[top.indices.numpy()]], axis=1)
        kept = np.argpartition(values, -k, axis=1)[:, -k:]
        best, places = np.take_along_axis(values, kept, axis=1), np.take_along_axis(where, kept, axis=1)
    return best, places
