"""Numbers with their intervals."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
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


def bootstrap_mean(values: ArrayLike, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean of ``values`` [N] with a 95% percentile bootstrap interval.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("bootstrap_mean needs at least one value")
    draws = np.random.default_rng(seed).integers(0, array.size, size=(resamples, array.size))
    means = array[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


def share(held: ArrayLike) -> Estimate:
    """Share of the [N] observations that are true, with Wilson's 95% interval: it is right for none and for all, too.

    Raises:
        ValueError: no values.
    """
    from scipy.stats import binomtest

    array = np.asarray(held, dtype=bool)
    if array.size == 0:
        raise ValueError("share needs at least one value")
    interval = binomtest(int(array.sum()), array.size).proportion_ci(0.95, method="wilson")
    return Estimate(float(array.mean()), float(interval.low), float(interval.high), int(array.size))


def correlation(first: ArrayLike, second: ArrayLike) -> dict[str, float] | None:
    """Pearson's correlation of [N] and [N] with its 95% interval by Fisher's z; None where it is not defined."""
    from scipy.stats import pearsonr

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size < LEAST_CORRELATED or np.std(a) == 0 or np.std(b) == 0:
        return None
    found = pearsonr(a, b)
    interval = found.confidence_interval(0.95)
    return {"value": float(found.statistic), "low": float(interval.low), "high": float(interval.high), "n": a.size}
