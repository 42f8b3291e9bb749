"""What judged pairs say about the trust of loss `trust`: which mix of label and margin predicts the person best."""

from typing import Any

import numpy as np

GRID = np.linspace(0.0, 1.0, 101)
HALF_CHI_SQUARE = 1.9207
"""Half of the 95% quantile of chi-square with one degree of freedom."""
FEWEST = 50
"""Judged pairs with a margin, below which nothing is said."""


def person_trust(margins: np.ndarray, flipped: np.ndarray, every_margin: np.ndarray) -> dict[str, Any]:
    """The trust t in [0, 1] whose target predicts the person best, by maximum likelihood, with a 95% interval.

    The target of loss `trust` is that the label is right with probability (1 - t) + t sigmoid(b m): at 0 the label is
    believed, at 1 the margin alone. b is the slope that a training measures on the labels as they are, so that the same
    numbers can be given to it. The interval holds the t whose likelihood ratio a chi-square test does not reject.

    Args:
        margins: m [N] of the judged pairs, for the label as it is.
        flipped: [N], whether the person found the label wrong.
        every_margin: margins of the table, or of a fair sample of it.

    Returns:
        ``value``, ``low``, ``high``, ``n``, ``slope`` and ``text``; the numbers are None where ``text`` says why.
    """
    from align.trust.slope import calibrated_slope

    nothing = {"value": None, "low": None, "high": None, "n": len(margins), "slope": None}
    if len(margins) < FEWEST:
        return {**nothing, "text": f"after {FEWEST} judged pairs with a margin the trust is estimated"}
    if not (every_margin < 0).any():
        return {**nothing, "text": "no margin is below 0, so how far margins can be believed has no finite value"}
    slope = calibrated_slope(every_margin)
    if slope == 0:
        return {**nothing, "slope": 0.0, "text": "the margins contradict the labels as often as they agree: trust 0"}
    likelihood = log_likelihood(margins, flipped, slope)
    best = int(likelihood.argmax())
    inside = GRID[likelihood >= likelihood[best] - HALF_CHI_SQUARE]
    value, low, high = float(GRID[best]), float(inside[0]), float(inside[-1])
    text = (
        f"your decisions are predicted best by a trust of {value:.2f} ({low:.2f} to {high:.2f}) in the margins: "
        f"{{loss: trust, parameters: {{trust: {value:.2f}, slope: {slope:.4g}, strength: 0}}}}"
    )
    return {"value": value, "low": low, "high": high, "n": len(margins), "slope": slope, "text": text}


def log_likelihood(margins: np.ndarray, flipped: np.ndarray, slope: float) -> np.ndarray:
    """Log-likelihood [101] of the person's decisions under each trust of ``GRID``."""
    from scipy.special import expit

    right = 1.0 - GRID[:, None] * expit(-slope * margins)
    with np.errstate(divide="ignore"):
        return np.where(flipped, np.log1p(-right), np.log(right)).sum(axis=1)
