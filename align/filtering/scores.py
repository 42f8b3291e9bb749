"""The scores of a pair that need no model, each a column that a user can look at and reuse. Higher is better."""

import numpy as np

DUPLICATE_DISTANCE = 1e-3
"""Distances below this count as this: two equal prompts are near, not infinitely near."""


def diversity(distance: np.ndarray) -> np.ndarray:
    """[N], log of the distance to the k-th neighbour: a pair's part in the k-NN entropy of the set.

    H ~ D / N sum_i log ||e_i - e_i^(k)|| + constants (Kozachenko and Leonenko; FiFA, arXiv 2410.10166).
    """
    return np.log(np.maximum(distance, DUPLICATE_DISTANCE))


def over_spread(margin: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Margin over its ensemble spread, with the median spread added so that a chance agreement does not decide, [N].

    The form is that of the moderated t statistic of Tusher, Tibshirani and Chu (2001).
    """
    whole = spread + np.median(spread)
    return np.divide(margin, whole, out=np.zeros_like(margin, dtype=np.float64), where=whole > 0)


def doubtful(margin: np.ndarray) -> np.ndarray:
    """Whether a margin contradicts its label strongly, [N] of bool.

    With p = sigmoid(margin) the belief in the label, a label is doubtful where the belief in its opposite, 1 - p, is at
    least the mean belief in all labels (confident learning, arXiv 1911.00068, whose per-class thresholds are one here:
    a pair and its mirror image say the same) and more than a half. Margins must be out-of-fold: a model believes what
    it was trained on.
    """
    belief = 0.5 * (1.0 + np.tanh(0.5 * margin))
    return (1.0 - belief >= belief.mean()) & (belief < 0.5)


def effective_number(vectors: np.ndarray, rows: np.ndarray | None = None, block: int = 65_536) -> float:
    """How many different directions N unit vectors amount to: exp of the entropy of the spectrum of Gram matrix / N.

    The Vendi score with the cosine as similarity (arXiv 2210.02410): 1 for N equal vectors, N for N orthogonal ones,
    never more than D. From the D x D matrix, which has the same non-zero spectrum.

    Args:
        vectors: [N, D], unit length.
        rows: those to use; all where absent.
        block: rows held in memory at a time.
    """
    where = np.arange(len(vectors)) if rows is None else rows
    total = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(where), block):
        part = np.asarray(vectors[where[start : start + block]])
        total += part.T @ part
    spectrum = np.linalg.eigvalsh(total / len(where))
    spectrum = spectrum[spectrum > 1e-12]
    return float(np.exp(-(spectrum * np.log(spectrum)).sum()))
