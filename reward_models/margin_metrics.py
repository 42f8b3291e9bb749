"""Accuracy and calibration of margins against the labels of their pairs."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from align.stats import Estimate, out_of_fold, share_interval

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose confidence max(p, 1 - p), p = sigmoid(margin), lies in [low, high)."""

    low: float
    high: float
    confidence: float
    """Mean confidence of the pairs in the bin."""
    accuracy: float
    """Share of the pairs in the bin whose margin agrees with the label."""
    count: int


@dataclass(frozen=True, slots=True)
class MarginMetrics:
    """Accuracy (ties count half) with its interval, log-loss (nats), Brier score, expected calibration error, bins."""

    n: int
    accuracy: Estimate
    log_loss: float
    brier: float
    """Mean squared difference of sigmoid(margin) and the label 1; 0.25 if all margins are 0."""
    ece: float
    """Expected calibration error over ``bins``."""
    mean_abs_margin: float
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate_margins(
    margins: ArrayLike, *, clusters: ArrayLike | None = None, cross_fitted: bool = False
) -> MarginMetrics:
    """Metrics of margins [N], chosen minus rejected.

    Args:
        margins: reward of chosen minus reward of rejected.
        clusters: cluster label of each pair, [N] (``clusters_of``), that intervals are over; None: no clusters.
        cross_fitted: the margins are out-of-fold, which widens the interval (``out_of_fold``).

    Raises:
        ValueError: there are no margins, or one is not finite.
    """
    m = np.asarray(margins, dtype=np.float64)
    if m.size == 0 or not np.isfinite(m).all():
        raise ValueError(f"margins must be finite and at least one, got {m.size} with {np.isfinite(m).sum()} finite")
    right = np.where(m == 0, 0.5, m > 0)
    accuracy = share_interval(right, clusters=clusters)
    if cross_fitted:
        accuracy = out_of_fold(accuracy, lowest=0.0, highest=1.0)
    bins = reliability_bins(m)
    ece = sum(item.count * abs(item.accuracy - item.confidence) for item in bins) / m.size
    return MarginMetrics(
        n=int(m.size),
        accuracy=accuracy,
        log_loss=float(np.logaddexp(0.0, -m).mean()),
        brier=float(np.mean(expit(-m) ** 2)),
        ece=float(ece),
        mean_abs_margin=float(np.abs(m).mean()),
        bins=bins,
    )


def reliability_bins(margins: np.ndarray) -> tuple[Bin, ...]:
    """Non-empty bins of equal width over confidences in [0.5, 1], as in a reliability diagram."""
    confidence = 1.0 / (1.0 + np.exp(-np.minimum(np.abs(margins), 700.0)))
    right = np.where(margins == 0, 0.5, margins > 0)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, BINS - 1)
    return tuple(
        Bin(
            low=float(edges[k]),
            high=float(edges[k + 1]),
            confidence=float(confidence[which == k].mean()),
            accuracy=float(right[which == k].mean()),
            count=int((which == k).sum()),
        )
        for k in range(BINS)
        if (which == k).any()
    )
