"""Marginal likelihood of labels and margins (empirical Bayes): what the margins are worth, without held-out labels.

The model, on the features x of the proxy (align/trust/linear_proxy.py):

    label     P(as given) = (1 - e) sigmoid(x th) + e sigmoid(-x th)             e: share of flipped labels
    margin    m = x mu + noise of variance s^2                                   s: independent error of each margin
    both      th ~ N(a mu_hat, v / D I + a^2 s^2 (X'X)^-1)                       a: slope, v: variance of the error of
                                                                                 x th that the pairs share
(a, v, e) on a grid are weighted by Laplace's approximation of the labels' marginal likelihood. The independent error of
the margins averages out over the pairs, the shared one does not; only the labels can show it.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import expit

from align.trust.newton import hessians, minimize_by_newton

SLOPES = (0.0, 0.25, 0.5, 0.8, 1.2, 1.7, 2.4, 3.4)
"""Values of a, as the standard deviation of a x mu_hat in log-odds: independent of the margins' unit."""
SHARED = (0.15, 0.4, 0.8, 1.4, 2.4, 4.0)
"""Values of sqrt(v), the standard deviation of the shared error in log-odds."""
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)
SMALLEST = 1e-6
TINY = 1e-300
PAIRS_PER_DIRECTION = 4
"""Fewest pairs per direction; with fewer pairs the last directions are left out."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Posterior means over the grid."""

    theta: np.ndarray
    """[D], the proxy policy."""
    slope: float
    """a, log-odds of the label per unit of margin without its independent error."""
    shared_error: float
    """sqrt(v), in log-odds: standard deviation of the error of a m that the pairs share."""
    independent_error: float
    """s, in units of the margin."""
    flip_rate: float
    """e."""


def fit_evidence(features: np.ndarray, margin: np.ndarray) -> Evidence:
    """Average over the grid, weighted by marginal likelihood.

    Args:
        features: x [N, D] from ``linear_proxy.scaled``, the directions in order of their variance.
        margin: m [N], not all 0.
    """
    count, whole = features.shape
    size = max(1, min(whole, count // PAIRS_PER_DIRECTION))
    features = features[:, :size]
    values, vectors = np.linalg.eigh(features.T @ features)
    values = np.maximum(values, SMALLEST * values[-1])
    rotated = features @ vectors
    mu = rotated.T @ margin / values
    noise = float(np.square(margin - rotated @ mu).sum() / max(count - size, 1))
    a, spread, flip = (np.array(column) for column in zip(*product(SLOPES, SHARED, FLIPS), strict=True))
    a = a / max(float(np.sqrt(np.square(rotated @ mu).mean())), TINY)
    variance = np.square(spread) / size + np.square(a) * noise / values[:, None]
    prior_mean = a * mu[:, None]

    def derivatives(logits: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, other = expit(logits), expit(-logits)
        keep = 1 - 2 * flip[settings]
        q, rise = flip[settings] + keep * p, keep * p * other
        fisher = np.square(rise) / np.maximum(q * (flip[settings] + keep * other), TINY)
        return -rise / np.maximum(q, TINY), fisher

    theta = minimize_by_newton(rotated, derivatives, prior_mean, 1 / variance)
    logits = rotated @ theta
    q = flip + (1 - 2 * flip) * expit(logits)
    _, curvature = derivatives(logits, np.arange(len(a)))
    determinant = np.linalg.slogdet(hessians(rotated, curvature, 1 / variance))[1] + np.log(variance).sum(axis=0)
    penalty = (np.square(theta - prior_mean) / variance).sum(axis=0)
    score = np.log(np.maximum(q, TINY)).sum(axis=0) - penalty / 2 - determinant / 2
    weight = np.exp(score - score.max())
    weight /= weight.sum()
    return Evidence(
        theta=np.pad(vectors @ (theta @ weight), (0, whole - size)),
        slope=float(weight @ a),
        shared_error=float(weight @ spread),
        independent_error=float(np.sqrt(noise)),
        flip_rate=float(weight @ flip),
    )
