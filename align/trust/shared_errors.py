"""Signs of an error that many margins share: what the labels still say about length or group once the margin is known.

An error that pairs share does not average out in training, and no spread of an ensemble shows it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from align.trust.newton import minimise

CLEAR = 3.0
"""Standard errors beyond which a sign is told to the user."""
SMALLEST_GROUP = 50
WEAK = 1e-6


def shared_error_signs(
    margin: np.ndarray, lengths: np.ndarray, groups: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Sign -> its numbers; ``z`` is in standard errors, and a sign is ``clear`` beyond 3 of them.

    Args:
        margin: m [N], chosen minus rejected.
        lengths: [N], words of the chosen response minus words of the rejected one.
        groups: [N], a category of each pair.

    Returns:
        ``length``: correlation of margin and length difference; ``z`` below 0: for a given margin, labels favour the
        shorter response more than it says. ``group NAME``: ``slope`` of the margins in that group and ``z`` of its
        difference from the others.
    """
    found: dict[str, dict[str, Any]] = {}
    if lengths.std() > 0:
        z = _z_of_second(np.stack([margin, lengths / lengths.std()], axis=1))
        correlation = float((margin * lengths).mean() / np.sqrt(np.square(margin).mean() * np.square(lengths).mean()))
        found["length"] = {"correlation": correlation, "z": z, "clear": abs(z) > CLEAR}
    names = sorted(set(groups)) if groups is not None else []
    if len(names) > 1:
        member = np.array(groups)
        for name in names:
            inside = member == name
            if min(inside.sum(), (~inside).sum()) >= SMALLEST_GROUP:
                z = _z_of_second(np.stack([margin, margin * inside], axis=1))
                slope = float(_logistic(margin[inside][:, None])[0][0])
                found[f"group {name}"] = {"slope": slope, "z": z, "clear": abs(z) > CLEAR}
    return found


def _z_of_second(features: np.ndarray) -> float:
    """Coefficient of the second feature over its standard error, by logistic regression without intercept."""
    coefficient, covariance = _logistic(features)
    return float(coefficient[1] / np.sqrt(covariance[1, 1]))


def _logistic(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [D] under which every label is as given, and their covariance [D, D]."""
    scale = np.sqrt(np.square(features).mean(axis=0))
    x = features / scale

    def slopes(logits: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = expit(logits)
        return p - 1, p * (1 - p)

    theta = minimise(x, slopes, np.zeros((x.shape[1], 1)), np.full((x.shape[1], 1), WEAK * len(x)))[:, 0]
    p = expit(x @ theta)
    information = (x * (p * (1 - p))[:, None]).T @ x + WEAK * len(x) * np.eye(x.shape[1])
    return theta / scale, np.linalg.inv(information) / np.outer(scale, scale)
