"""The scores of a pair that need no model, each a column that users can look at and reuse. Higher is better."""

import numpy as np

DUPLICATE_DISTANCE = 1e-3
"""Lower bound of distances, so that equal prompts have a finite score."""


def diversity(distance: np.ndarray) -> np.ndarray:
    """Log of the distance to the k-th nearest neighbor, [N]: a pair's term in the k-NN entropy of the set.

    H ~ D / N sum_i log ||e_i - e_i^(k)|| + constants (Kozachenko and Leonenko; FiFA, arXiv 2410.10166).
    """
    return np.log(np.maximum(distance, DUPLICATE_DISTANCE))


def over_spread(margin: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Margin divided by its ensemble spread plus the median spread, [N].

    The form is the moderated t statistic of Tusher, Tibshirani and Chu (2001): the median keeps spreads that
    are small by chance from dominating.
    """
    moderated = spread + np.median(spread)
    return np.divide(margin, moderated, out=np.zeros_like(margin, dtype=np.float64), where=moderated > 0)


def doubtful(margin: np.ndarray) -> np.ndarray:
    """Whether a margin strongly contradicts its label, bool [N].

    With p = sigmoid(margin) the confidence in the label, a label is doubtful if the confidence in its opposite, 1 - p,
    is at least the mean confidence in all labels (confident learning, arXiv 1911.00068, with one threshold for both
    classes, since swapping chosen and rejected swaps them) and above one half. Margins must be out-of-fold: a model is
    confident in the labels that it was trained on.
    """
    confidence = 0.5 * (1.0 + np.tanh(0.5 * margin))
    return (1.0 - confidence >= confidence.mean()) & (confidence < 0.5)


def effective_number(vectors: np.ndarray, rows: np.ndarray | None = None, block: int = 65_536) -> float:
    """Effective number of unit vectors: exp of the entropy of the spectrum of the Gram matrix / N.

    It is the Vendi score with the cosine as similarity (arXiv 2210.02410): 1 for N equal vectors, N for N orthogonal
    ones, at most D. The spectrum is computed from the D x D matrix, which has the same non-zero eigenvalues.

    Args:
        vectors: [N, D], unit length.
        rows: rows to use; None: all.
        block: rows in memory at a time.
    """
    where = np.arange(len(vectors)) if rows is None else rows
    total = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(where), block):
        part = np.asarray(vectors[where[start : start + block]])
        total += part.T @ part
    spectrum = np.linalg.eigvalsh(total / len(where))
    spectrum = spectrum[spectrum > 1e-12]
    return float(np.exp(-(spectrum * np.log(spectrum)).sum()))
