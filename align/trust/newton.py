"""Many small ridge-penalized regressions on the same features at once, by Newton's method."""

from collections.abc import Callable

import numpy as np

Derivatives = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(logits [N, s], settings [s]) -> first and second derivative (>= 0) of the loss in the logits, each [N, s]."""
LONGEST_STEP = 4.0
"""Largest change of a logit in one Newton step: a quadratic approximates a logistic loss no further."""
TOLERANCE = 1e-5
"""A setting has converged if its Newton step changes no logit by more."""
ITERATIONS = 60
CHUNK = 4096
FEW = 16


def minimize_by_newton(
    features: np.ndarray, derivatives: Derivatives, prior_mean: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """Minimize  sum_i loss_i(x_i theta) + sum_j precision_j (theta_j - prior_mean_j)^2 / 2  in every column of theta.

    Args:
        features: x [N, D].
        derivatives: derivatives of the loss, for some of the settings.
        prior_mean: [D, S], minimum of the penalty and start of the search.
        precision: [D, S], above 0.

    Returns:
        theta [D, S].
    """
    theta = np.array(prior_mean, dtype=np.float64)
    logits = features @ theta
    active = np.arange(theta.shape[1])
    for _ in range(ITERATIONS):
        gradient, curvature = derivatives(logits[:, active], active)
        total = features.T @ gradient + precision[:, active] * (theta[:, active] - prior_mean[:, active])
        step = -np.linalg.solve(hessians(features, curvature, precision[:, active]), total.T[..., None])[..., 0].T
        change = features @ step
        largest = np.abs(change).max(axis=0)
        damping = np.minimum(1.0, LONGEST_STEP / np.maximum(largest, 1e-300))
        theta[:, active] += damping * step
        logits[:, active] += damping * change
        active = active[largest > TOLERANCE]
        if not len(active):
            break
    return theta


def hessians(features: np.ndarray, curvature: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Hessian X' diag(curvature_s) X + diag(precision_s) of every setting, [S, D, D].

    For many settings it is one product of [S, N] with [N, D (D + 1) / 2], in float32, since it only shapes the Newton
    step; for at most ``FEW`` one product each is faster.
    """
    size = features.shape[1]
    if curvature.shape[1] <= FEW:
        each = [(features * column[:, None]).T @ features for column in curvature.T]
        return np.array([product + np.diag(own) for product, own in zip(each, precision.T, strict=True)])
    upper = np.triu_indices(size)
    packed = np.zeros((curvature.shape[1], len(upper[0])), dtype=np.float32)
    for start in range(0, len(features), CHUNK):
        part = features[start : start + CHUNK].astype(np.float32)
        products = part[:, upper[0]] * part[:, upper[1]]
        packed += curvature[start : start + CHUNK].T.astype(np.float32) @ products
    full = np.empty((len(packed), size, size))
    full[:, upper[0], upper[1]] = packed
    full[:, upper[1], upper[0]] = packed
    full[:, np.arange(size), np.arange(size)] += precision.T
    return full
