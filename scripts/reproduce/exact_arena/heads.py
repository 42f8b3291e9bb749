"""Logistic reward models on the features of pairs, with the ridge that cross-validation chooses.

Shapes: N pairs, D features; a row of x is the preferred response minus the other. The fit is the exact one of
`align trust` (align/trust/linear_proxy.py) for DPO, which reads no margins.
"""

import numpy as np

from align.trust.linear_proxy import DPO, Family, fit, held_out
from align.trust.selection import by_labels

FOLDS = 5
FAMILY = Family(grid=(DPO,))


def fit_head(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Direction [D] of the reward model of the pairs x [N, D]."""
    unread = np.where(np.arange(len(x)) % 2, 1.0, -1.0)
    loglik = held_out(x, unread, [rng.permutation(len(x)) % FOLDS], FAMILY).loglik
    direction: np.ndarray = fit(x, unread, 0.0, FAMILY)[:, 0, by_labels(loglik).spread]
    return direction


def out_of_fold_margins(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Margins [N], each from a reward model that was fitted without the pair's fold."""
    fold = rng.permutation(len(x)) % FOLDS
    margin = np.empty(len(x))
    for number in range(FOLDS):
        test = fold == number
        margin[test] = x[test] @ fit_head(x[~test], rng)
    return margin
