"""What the margins are worth by marginal likelihood, without holding labels out (empirical Bayes).

The model, on the features x of the proxy (align/trust/linear_proxy.py):

    label     P(as given) = (1 - e) sigmoid(x th) + e sigmoid(-x th)             e: share of flipped labels
    margin    m = x mu + noise of variance s^2                                   s: error of each margin by itself
    both      th ~ N(a mu_hat, v / D I + a^2 s^2 (X'X)^-1)                       a: slope, v: variance of the error of
                                                                                 x th that the pairs share
(a, v, e) are weighed by Laplace's approximation of the labels' marginal likelihood on a grid. The margins' independent
error averages out over the pairs, the shared one does not: only the labels can show it, and here they do.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import expit

from align.trust.newton import hessians, minimise

SLOPES = (0.0, 0.25, 0.5, 0.8, 1.2, 1.7, 2.4, 3.4)
"""a, as the standard deviation of a x mu_hat in log-odds: in the labels' units whatever the margins' are."""
SHARED = (0.15, 0.4, 0.8, 1.4, 2.4, 4.0)
"""sqrt(v), standard deviation of the shared error in log-odds."""
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)
SMALLEST = 1e-6
TINY = 1e-300
PAIRS_A_DIRECTION = 4
"""Fewest pairs for each direction that is used; the last directions are left out where there are fewer."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Posterior means over the grid."""

    theta: np.ndarray
    """[D], the proxy policy."""
    slope: float
    """a, log-odds of the label per unit of margin, its independent error taken off."""
    shared_error: float
    """sqrt(v), in log-odds: standard deviation of what a times the margins gets wrong in a way that pairs share."""
    independent_error: float
    """s, in units of the margin."""
    flip_rate: float
    """e."""


def weigh(features: np.ndarray, margin: np.ndarray) -> Evidence:
    """The evidence's policy and what it found.

    Args:
        features: x [N, D] as ``proxy.scaled`` makes them, the directions in order of their importance.
        margin: m [N], not all 0.
    """
    count, whole = features.shape
    size = max(1, min(whole, count // PAIRS_A_DIRECTION))
    features = features[:, :size]
    values, vectors = np.linalg.eigh(features.T @ features)
    values = np.maximum(values, SMALLEST * values[-1])
    rotated = features @ vectors
    mu = rotated.T @ margin / values
    noise = float(np.square(margin - rotated @ mu).sum() / max(count - size, 1))
    a, spread, flip = (np.array(column) for column in zip(*product(SLOPES, SHARED, FLIPS), strict=True))
    a = a / max(float(np.sqrt(np.square(rotated @ mu).mean())), TINY)
    variance = np.square(spread) / size + np.square(a) * noise / values[:, None]
    centre = a * mu[:, None]

    def slopes(logits: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, other = expit(logits), expit(-logits)
        keep = 1 - 2 * flip[settings]
        q, rise = flip[settings] + keep * p, keep * p * other
        fisher = np.square(rise) / np.maximum(q * (flip[settings] + keep * other), TINY)
        return -rise / np.maximum(q, TINY), fisher

    theta = minimise(rotated, slopes, centre, 1 / variance)
    logits = rotated @ theta
    q = flip + (1 - 2 * flip) * expit(logits)
    _, curvature = slopes(logits, np.arange(len(a)))
    determinant = np.linalg.slogdet(hessians(rotated, curvature, 1 / variance))[1] + np.log(variance).sum(axis=0)
    penalty = (np.square(theta - centre) / variance).sum(axis=0)
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
