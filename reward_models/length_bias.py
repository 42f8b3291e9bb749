"""Does a reward model pay for length? From margins and the lengths of the two responses, in words."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import spearmanr

from align.data.text import count_words
from align.stats import share_among

LEAST = 4
"""Pairs below which no rank correlation is given."""


def word_difference(pairs: Dataset) -> np.ndarray:
    """Words of the chosen less words of the rejected response, float64 [N]."""
    return np.array([count_words(row["chosen"]) - count_words(row["rejected"]) for row in pairs], dtype=np.float64)


def length_slope(margins: np.ndarray, words: np.ndarray) -> float:
    """Margin per word: least squares through the origin, so that exchanging the responses changes nothing.

    It takes all of what rises with length for bias, also what longer responses deserve.
    """
    squares = float(words @ words)
    return float(margins @ words) / squares if squares > 0 else 0.0


def length_probe(
    margins: np.ndarray, words: np.ndarray, *, seed: int, clusters: np.ndarray | None = None
) -> dict[str, Any]:
    """How margins [N] and differences of lengths [N] go together.

    Args:
        margins: reward of chosen less reward of rejected.
        words: words of chosen less words of rejected.
        seed: of the intervals.
        clusters: of the pairs, [N], that the accuracies' intervals draw together.

    Returns:
        ``slope`` (margin per word), ``explained`` (share of the margins' squares that it accounts for), ``correlation``
        (Spearman's, 95% interval by Fisher's z; None where it is not defined), ``accuracy_longer`` and
        ``accuracy_shorter`` (where the chosen response is the longer or the shorter one; None without such pairs),
        ``longer_preferred`` (share of pairs of unlike length whose longer response has the higher reward).
    """
    slope = length_slope(margins, words)
    squares = float(margins @ margins)
    unlike = words != 0
    right = np.where(margins == 0, 0.5, margins > 0)
    share = partial(share_among, seed=seed, clusters=clusters)
    return {
        "pairs": len(margins),
        "slope": slope,
        "explained": slope**2 * float(words @ words) / squares if squares > 0 else 0.0,
        "correlation": _rank_correlation(margins, words),
        "accuracy_longer": share(right, words > 0),
        "accuracy_shorter": share(right, words < 0),
        "longer_preferred": share(np.where(words > 0, right, 1 - right), unlike),
    }


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> dict[str, float] | None:
    if len(first) < LEAST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    value = float(spearmanr(first, second).statistic)
    middle, half = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)), 1.96 * np.sqrt(1.06 / (len(first) - 3))
    low, high = np.tanh([middle - half, middle + half])
    return {"value": value, "low": float(low), "high": float(high), "n": len(first)}
