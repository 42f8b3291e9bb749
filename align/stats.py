"""Estimates with 95% intervals: percentile bootstrap, cluster bootstrap, Fisher's z; and their text form."""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
CHUNK_CELLS = 4_000_000
"""Largest number of resampled values in memory at once."""
EXACT_TAIL = 0.025
LEAST_CORRELATED = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def bootstrap_mean(
    values: ArrayLike, *, seed: int, resamples: int = RESAMPLES, clusters: ArrayLike | None = None
) -> Estimate:
    """Mean of ``values`` [N] with a 95% percentile bootstrap interval; with ``clusters`` a cluster bootstrap.

    Args:
        values: observations.
        seed: seed of the resampling.
        resamples: number of resamples.
        clusters: cluster label of each observation, [N]; all observations of a cluster are resampled together. Without
            labels, and with a single cluster, each observation is resampled on its own.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("bootstrap_mean needs at least one value")
    rng = np.random.default_rng(seed)
    which = cluster_codes(clusters)
    if which is None:
        rows = max(1, CHUNK_CELLS // array.size)
        means = [
            array[rng.integers(0, array.size, size=(min(rows, resamples - done), array.size))].mean(axis=1)
            for done in range(0, resamples, rows)
        ]
    else:
        sums, sizes = np.bincount(which, weights=array), np.bincount(which)
        rows = max(1, CHUNK_CELLS // sums.size)
        means = []
        for done in range(0, resamples, rows):
            drawn = rng.integers(0, sums.size, size=(min(rows, resamples - done), sums.size))
            means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


def cluster_codes(clusters: ArrayLike | None) -> np.ndarray | None:
    """Codes 0, 1, ... [N] of the cluster labels; None if every cluster has one observation, or there is one cluster."""
    if clusters is None:
        return None
    names, which = np.unique(np.asarray(clusters), return_inverse=True)
    return which if 1 < names.size < which.size else None


def bootstrap_share(
    values: ArrayLike, *, seed: int, resamples: int = RESAMPLES, clusters: ArrayLike | None = None
) -> Estimate:
    """Proportion: ``bootstrap_mean`` of values in [0, 1], with an exact bound if all values are 0 or all are 1.

    All resamples of equal values are equal, so their bootstrap interval has no width. In that case the far end of the
    interval is Clopper and Pearson's exact bound, 0.025^(1/N) for values of 1, where N is the number of clusters if
    there are any.

    Raises:
        ValueError: no values.
    """
    found = bootstrap_mean(values, seed=seed, resamples=resamples, clusters=clusters)
    if found.low < found.high or found.value not in (0.0, 1.0):
        return found
    which = cluster_codes(clusters)
    least = EXACT_TAIL ** (1 / (found.n if which is None else int(which.max()) + 1))
    return replace(found, low=least) if found.value == 1.0 else replace(found, high=1 - least)


def share_among(
    values: np.ndarray, of: np.ndarray, *, seed: int, clusters: np.ndarray | None = None
) -> dict[str, float] | None:
    """``bootstrap_share`` as JSON of the ``values`` [N] selected by the mask ``of`` [N]; None if it selects none."""
    if not of.any():
        return None
    return bootstrap_share(values[of], seed=seed, clusters=None if clusters is None else clusters[of]).to_dict()


def correlation(first: ArrayLike, second: ArrayLike) -> dict[str, float] | None:
    """Pearson's correlation of [N] and [N] with its 95% interval by Fisher's z; None if it is not defined."""
    from scipy.stats import pearsonr

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size < LEAST_CORRELATED or np.std(a) == 0 or np.std(b) == 0:
        return None
    found = pearsonr(a, b)
    interval = found.confidence_interval(0.95)
    return {"value": float(found.statistic), "low": float(interval.low), "high": float(interval.high), "n": a.size}


def number(value: float, spread: float | None = None) -> str:
    """A number with as many digits as two significant digits of its spread."""
    if spread is None or not spread > 0:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(spread)))
    return f"{value:.{min(digits, 4)}f}"


def interval(estimate: dict[str, float]) -> str:
    """``0.82 (0.70 to 0.95)``: value and 95% interval."""
    half = (estimate["high"] - estimate["low"]) / 2
    value, low, high = (number(estimate[key], half) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
