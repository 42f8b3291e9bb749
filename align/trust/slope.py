"""Slope b of the margins: the label's log-odds per unit of margin, by logistic regression through the origin."""

import numpy as np
from scipy.special import expit

ROOM = 60
"""Halvings of the interval that holds the slope."""


def calibrated_slope(margin: np.ndarray) -> float:
    """The b >= 0 under which the labels are most likely, P(label as given) = sigmoid(b m).

    0 where the margins contradict the labels more than they agree: a reward model is never used upside down.

    Args:
        margin: [N], of the response that the label prefers minus the other; at least one of them below 0.

    Raises:
        ValueError: no margin is below 0, so that the slope has no finite value.
    """
    if not (margin < 0).any():
        raise ValueError("calibrated_slope needs a margin below 0")
    if margin.mean() <= 0:
        return 0.0
    low, high = 0.0, 1.0 / float(np.abs(margin).mean())
    while _derivative(margin, high) > 0:
        low, high = high, 2 * high
    for _ in range(ROOM):
        middle = (low + high) / 2
        if _derivative(margin, middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _derivative(margin: np.ndarray, slope: float) -> float:
    """Of the labels' mean log-likelihood in the slope; falls with the slope."""
    return float((margin * expit(-slope * margin)).mean())
