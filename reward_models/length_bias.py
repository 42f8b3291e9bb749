"""Length bias of a reward model, from margins and the lengths of the two responses in words."""

from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import rankdata

from align.data.text import count_words
from align.stats import correlation, share_among

LEAST = 4
"""Smallest number of pairs for a rank correlation."""


def word_difference(pairs: Dataset) -> np.ndarray:
    """Words of the chosen minus words of the rejected response, float64 [N]."""
    return np.array([count_words(row["chosen"]) - count_words(row["rejected"]) for row in pairs], dtype=np.float64)


def length_slope(margins: np.ndarray, words: np.ndarray) -> float:
    """Margin per word: least squares without intercept, so that exchanging the responses changes nothing.

    The slope counts every trend with length as bias, even if longer responses are better.
    """
    squares = float(words @ words)
    return float(margins @ words) / squares if squares > 0 else 0.0


def length_probe(margins: np.ndarray, words: np.ndarray, *, clusters: np.ndarray | None = None) -> dict[str, Any]:
    """Statistics of margins [N] against differences of lengths [N].

    Args:
        margins: reward of chosen minus reward of rejected.
        words: words of chosen minus words of rejected.
        clusters: cluster label of each pair, [N], for intervals of the accuracies over clusters.

    Returns:
        ``slope`` (margin per word), ``explained`` (its share of the sum of squared margins), ``correlation``
        (Spearman's, with a 95% interval; None if it is not defined), ``accuracy_longer`` and
        ``accuracy_shorter`` (among pairs whose chosen response is longer or shorter; None without such pairs),
        ``longer_preferred`` (share of the pairs with different lengths whose longer response has the higher reward).
    """
    slope = length_slope(margins, words)
    squares = float(margins @ margins)
    unlike = words != 0
    right = np.where(margins == 0, 0.5, margins > 0)
    share = partial(share_among, clusters=clusters)
    return {
        "pairs": len(margins),
        "slope": slope,
        "explained": slope**2 * float(words @ words) / squares if squares > 0 else 0.0,
        "correlation": _rank_correlation(margins, words, clusters),
        "accuracy_longer": share(right, words > 0),
        "accuracy_shorter": share(right, words < 0),
        "longer_preferred": share(np.where(words > 0, right, 1 - right), unlike),
    }


def _rank_correlation(first: np.ndarray, second: np.ndarray, clusters: np.ndarray | None) -> dict[str, Any] | None:
    """Spearman's correlation: Pearson's of the ranks."""
    return correlation(rankdata(first), rankdata(second), clusters=clusters)
