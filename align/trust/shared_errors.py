"""Signs of an error that many margins share: whether length or group predicts the label beyond the margin.

An error that pairs share does not average out in training, and the spread of an ensemble does not show it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from align.stats import cluster_codes
from align.trust.newton import minimize_by_newton
from align.trust.selection import cluster_sums

CLEAR = 3.0
"""Standard errors beyond which a sign is reported to the user."""
SMALLEST_GROUP = 50
RIDGE = 1e-6


def shared_error_signs(
    margin: np.ndarray,
    lengths: np.ndarray,
    groups: Sequence[str] | None = None,
    clusters: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Test for each sign of a shared error; ``z`` is a Wald statistic, and a sign is ``clear`` if |z| is above 3.

    Args:
        margin: m [N], chosen minus rejected.
        lengths: [N], words of the chosen response minus words of the rejected one.
        groups: [N], a category of each pair.
        clusters: cluster [N] of every pair, for standard errors that allow for dependence within; None: no clusters.

    Returns:
        ``length``: ``correlation`` of margin and length difference, and ``z`` of the length: below 0, labels favor the
        shorter response more than the margin predicts. ``group NAME``: ``slope`` of the margins in that group, and
        ``z`` of its difference from the others.
    """
    found: dict[str, dict[str, Any]] = {}
    if lengths.std() > 0:
        z = _wald_z_of_second(np.stack([margin, lengths / lengths.std()], axis=1), clusters)
        correlation = float((margin * lengths).mean() / np.sqrt(np.square(margin).mean() * np.square(lengths).mean()))
        found["length"] = {"correlation": correlation, "z": z, "clear": abs(z) > CLEAR}
    names = sorted(set(groups)) if groups is not None else []
    if len(names) > 1:
        member = np.array(groups)
        for name in names:
            inside = member == name
            if min(inside.sum(), (~inside).sum()) >= SMALLEST_GROUP:
                z = _wald_z_of_second(np.stack([margin, margin * inside], axis=1), clusters)
                slope = float(_logistic_regression(margin[inside][:, None])[0][0])
                found[f"group {name}"] = {"slope": slope, "z": z, "clear": abs(z) > CLEAR}
    return found


def _wald_z_of_second(features: np.ndarray, clusters: np.ndarray | None) -> float:
    """Wald statistic (coefficient over standard error) of the second feature, by ``_logistic_regression``."""
    coefficient, covariance = _logistic_regression(features, clusters)
    return float(coefficient[1] / np.sqrt(covariance[1, 1]))


def _logistic_regression(features: np.ndarray, clusters: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fit P(label as given) = sigmoid(x theta), without intercept: coefficients [D] and their covariance [D, D].

    With clusters the covariance is the sandwich of the scores' sums over clusters (Liang and Zeger, 1986).
    """
    scale = np.sqrt(np.square(features).mean(axis=0))
    x = features / scale

    def derivatives(logits: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = expit(logits)
        return p - 1, p * (1 - p)

    ridge = np.full((x.shape[1], 1), RIDGE * len(x))
    theta = minimize_by_newton(x, derivatives, np.zeros_like(ridge), ridge)[:, 0]
    p = expit(x @ theta)
    information = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    covariance = np.linalg.inv(information)
    if cluster_codes(clusters) is not None:
        scores = cluster_sums(x * (1 - p)[:, None], clusters)
        covariance = covariance @ (scores.T @ scores) @ covariance
    return theta / scale, covariance / np.outer(scale, scale)
