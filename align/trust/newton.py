"""Many small penalised regressions on the same features at once, by Newton's method."""

from collections.abc import Callable

import numpy as np

Slopes = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(logits [N, s], settings [s]) -> derivative of the loss in the logits and its curvature (at least 0), each [N, s]."""
LONGEST_STEP = 4.0
"""A step changes no logit by more: beyond, a quadratic says nothing about a logistic loss."""
TOLERANCE = 1e-5
"""Change of a logit below which a setting is done."""
ITERATIONS = 60
CHUNK = 4096


def minimise(features: np.ndarray, slopes: Slopes, centre: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """theta [D, S], each column minimising  sum_i loss_i(x_i theta) + sum_j precision_j (theta_j - centre_j)^2 / 2.

    Args:
        features: x [N, D].
        slopes: of the loss, for the settings that are asked for.
        centre: [D, S], where the penalty is 0 and the search starts.
        precision: [D, S], above 0.
    """
    theta = np.array(centre, dtype=np.float64)
    logits = features @ theta
    open_ = np.arange(theta.shape[1])
    for _ in range(ITERATIONS):
        gradient, curvature = slopes(logits[:, open_], open_)
        total = features.T @ gradient + precision[:, open_] * (theta[:, open_] - centre[:, open_])
        step = -np.linalg.solve(hessians(features, curvature, precision[:, open_]), total.T[..., None])[..., 0].T
        change = features @ step
        largest = np.abs(change).max(axis=0)
        factor = np.minimum(1.0, LONGEST_STEP / np.maximum(largest, 1e-300))
        theta[:, open_] += factor * step
        logits[:, open_] += factor * change
        open_ = open_[largest > TOLERANCE]
        if not len(open_):
            break
    return theta


def hessians(features: np.ndarray, curvature: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """X' diag(curvature_s) X + diag(precision_s) for every setting, [S, D, D].

    One product of [S, N] with [N, D (D + 1) / 2]; single precision, for it only shapes the step.
    """
    size = features.shape[1]
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
