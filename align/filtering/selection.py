"""Selection of pairs by their scores. Deterministic: ties go to the smaller id, whatever the order of the file."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.io.console import log

IQR_OF_NORMAL = 1.349
BOUND = 3.0
"""Largest absolute value of a scaled score, so that one odd score does not outweigh all others."""
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class RobustScale:
    """Median and interquartile range (IQR), as in scikit-learn's ``RobustScaler`` with ``unit_variance``."""

    median: float
    width: float
    """IQR / 1.349, the standard deviation of a normal distribution; if the IQR is 0, that of the values."""

    @classmethod
    def fit(cls, values: np.ndarray) -> "RobustScale":
        """Fit to values [N]."""
        low, median, high = map(float, np.quantile(values, [0.25, 0.5, 0.75]))
        return cls(median, (high - low) / IQR_OF_NORMAL or float(np.std(values, dtype=np.float64)))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(x - median) / width, clipped to +-``BOUND``; 0 if all values are the same."""
        if not self.width > 0:
            return np.zeros_like(values, dtype=np.float64)
        scaled = np.subtract(values, self.median, dtype=np.float64)
        scaled /= self.width
        return np.clip(scaled, -BOUND, BOUND, out=scaled)


def robust_scale(values: np.ndarray) -> np.ndarray:
    """Scale values [N] by their own median and interquartile range."""
    return RobustScale.fit(values)(values)


def importance(columns: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum [N] of the robustly scaled, clipped columns (FiFA's margin + alpha quality + gamma diversity)."""
    total = np.zeros(len(next(iter(columns.values()))))
    for name, weight in weights.items():
        if weight != 0:
            values = columns[name]
            scale = RobustScale.fit(values)
            for start in range(0, len(values), BLOCK):
                total[start : start + BLOCK] += weight * scale(values[start : start + BLOCK])
    return total


def without_effect(columns: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> list[str]:
    """Names of the weighted columns that are the same for all pairs, and so choose none; a warning names each."""
    names = [name for name, weight in weights.items() if weight != 0 and np.ptp(columns[name]) == 0]
    for name in names:
        why = " (equal prompts?)" if name == "diversity" else ""
        log.warning("%s: found the same value for all pairs that pass the rules%s, so it does not count", name, why)
    return names


def warn_if_unranked(values: np.ndarray, kept: int) -> None:
    """Warn that nothing but ids chose the pairs: all have the same importance, [L], and not all of them are kept."""
    if kept < len(values) and np.ptp(values) == 0:
        log.warning(
            "importance: found the same value for all %d pairs that pass the rules, so the %d kept ones are those with "
            "the smallest ids; give a score that differs, a positive weight, or --keep 1", len(values), kept,
        )  # fmt: skip


def top_k(
    values: np.ndarray, ids: Sequence[Any] | np.ndarray, count: int, groups: Sequence[str] | np.ndarray | None = None
) -> np.ndarray:
    """Indices of the ``count`` largest values, ascending; with ``groups`` stratified: the same share of each group.

    The quotas of the groups are rounded by largest remainder, so that they add up to ``count``.
    """
    if groups is None:
        return _largest(values, np.asarray(ids), count)
    order = np.lexsort((np.asarray(ids), -values))
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    exact = count * np.bincount(group) / len(values)
    quota = exact.astype(np.int64)
    remainder = np.lexsort((names, quota - exact))
    quota[remainder[: count - int(quota.sum())]] += 1
    kept = [order[group[order] == k][: quota[k]] for k in range(len(names))]
    return np.sort(np.concatenate(kept))


def _largest(values: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Top-k by partition instead of a full sort; ties at the smallest kept value go to the smaller ids."""
    if count >= len(values) or count < 1:
        return np.arange(len(values) if count > 0 else 0)
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    first = equal[np.argsort(ids[equal], kind="stable")[: count - len(above)]]
    return np.sort(np.concatenate([above, first]))


def greedy(
    base: np.ndarray, vectors: np.ndarray, ids: Sequence[Any] | np.ndarray, count: int, *, weight: float
) -> np.ndarray:
    """Indices of ``count`` pairs picked one by one, each by base + weight * log distance to the nearest kept pair.

    The distance to the kept pairs only decreases, so an earlier gain is an upper bound of the present one and most
    gains are not recomputed (lazy greedy). The first pick has the largest base.

    Args:
        base: [N], importance of a pair without diversity.
        vectors: [N, D], unit length.
        ids: N ids, or their ranks.
        count: pairs to keep.
        weight: weight of diversity.
    """
    from align.filtering.scores import DUPLICATE_DISTANCE

    kept: list[int] = []
    store = np.empty((min(count, len(base)), vectors.shape[1]), dtype=np.float32)
    nearest = np.full(len(base), 2.0)  # the diameter of the unit sphere, before any pair is kept
    seen = np.zeros(len(base), dtype=np.int64)

    def gain(k: int) -> float:
        return float(base[k] + weight * np.log(max(nearest[k], DUPLICATE_DISTANCE)))

    heap = [(-gain(k), ids[k], k) for k in range(len(base))]
    heapq.heapify(heap)
    while heap and len(kept) < count:
        _, name, k = heapq.heappop(heap)
        if seen[k] < len(kept):
            similarity = store[seen[k] : len(kept)] @ vectors[k]
            nearest[k] = min(nearest[k], float(np.sqrt(max(2.0 - 2.0 * float(similarity.max()), 0.0))))
            seen[k] = len(kept)
            heapq.heappush(heap, (-gain(k), name, k))
        else:
            store[len(kept)] = vectors[k]
            kept.append(k)
    return np.sort(np.array(kept, dtype=np.int64))
