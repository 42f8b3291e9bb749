"""Slope b of the margins: log-odds of the label per unit of margin, by logistic regression without intercept."""

import numpy as np
from scipy.special import expit

BISECTIONS = 60
"""Halvings of the interval that holds the slope."""


def calibrated_slope(margin: np.ndarray) -> float:
    """The maximum-likelihood slope b >= 0 of P(label as given) = sigmoid(b m) (Platt scaling without intercept).

    It is 0 if the margins contradict the labels more than they agree: a reward model is never inverted.

    Args:
        margin: [N], reward of the response that the label prefers minus the other's; at least one is below 0.

    Raises:
        ValueError: no margin is below 0, so the slope has no finite value.
    """
    if not (margin < 0).any():
        raise ValueError("calibrated_slope needs a margin below 0")
    if margin.mean() <= 0:
        return 0.0
    low, high = 0.0, 1.0 / float(np.abs(margin).mean())
    while _derivative(margin, high) > 0:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _derivative(margin, middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _derivative(margin: np.ndarray, slope: float) -> float:
    """Derivative of the labels' mean log-likelihood with respect to the slope; it decreases in the slope."""
    return float((margin * expit(-slope * margin)).mean())
