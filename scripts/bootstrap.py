"""The percentile bootstrap of the kept studies, whose tables have 100 seeds or more; the program has align/stats.py."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
CHUNK_CELLS = 4_000_000
"""Largest number of resampled values in memory at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def bootstrap_mean(values: ArrayLike, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean of ``values`` [N] with a 95% percentile bootstrap interval.

    Args:
        values: observations.
        seed: seed of the resampling.
        resamples: number of resamples.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("bootstrap_mean needs at least one value")
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK_CELLS // array.size)
    means = [
        array[rng.integers(0, array.size, size=(min(rows, resamples - done), array.size))].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


def gain_per_root_kl(gain: np.ndarray, kl: np.ndarray, *, seed: int) -> Estimate | None:
    """mean gain / sqrt(2 mean KL) with a joint bootstrap interval; None unless the KL is above 0 in 97.5% of resamples.

    Args:
        gain: reward minus the baseline's, [N].
        kl: log policy(y) - log reference(y) of the policy's samples, [N], nats.
        seed: seed of the bootstrap.
    """
    if kl.mean() <= 0:
        return None
    draws = np.random.default_rng(seed).integers(0, len(gain), size=(RESAMPLES, len(gain)))
    kls = kl[draws].mean(axis=1)
    positive = kls > 0
    if positive.mean() < 0.975:
        return None
    ratios = gain[draws].mean(axis=1)[positive] / np.sqrt(2 * kls[positive])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(gain.mean() / np.sqrt(2 * kl.mean())), float(low), float(high), len(gain))
