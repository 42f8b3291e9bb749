"""Linear heads on feature differences whose pairs have weights, many sets of weights at once.

Legend: N pairs, D features, S sets of weights. A row of x is the chosen response's features minus the rejected one's.
"""

import numpy as np
from scipy.special import expit

from align.trust.linear_proxy import log_sigmoid
from align.trust.newton import minimize_by_newton

PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Ridge penalties per unit of weight that cross-validation tries, for features of which the mean of |x|^2 is D."""


def fit_weighted(x: np.ndarray, weights: np.ndarray, penalty: np.ndarray | float) -> np.ndarray:
    """Heads [D, S], each the minimum of  sum_i w_i (-log sigmoid(x_i theta)) + penalty (sum_i w_i) |theta|^2 / 2.

    The penalty is one per unit of weight: heads of a part of the pairs shrink as much as the head of all pairs.

    Args:
        x: [N, D].
        weights: [N, S], at least 0, some above 0 in every column.
        penalty: [S], or one for all; above 0.
    """
    ridge = np.broadcast_to(penalty, weights.shape[1:]) * weights.sum(axis=0)

    def derivatives(logits: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, w = expit(logits), weights[:, columns]
        return w * (p - 1), w * p * (1 - p)

    precision = np.tile(ridge, (x.shape[1], 1))
    return minimize_by_newton(x, derivatives, np.zeros_like(precision), precision)


def held_out_losses(x: np.ndarray, weights: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Log-losses [N, penalties] in nats of every pair under the head of the other folds.

    Args:
        x: [N, D].
        weights: [N], of the pairs in training.
        fold: [N].
    """
    losses = np.zeros((len(x), len(PENALTIES)))
    for number in np.unique(fold):
        test = fold == number
        heads = fit_weighted(x[~test], np.tile(weights[~test, None], len(PENALTIES)), np.array(PENALTIES))
        losses[test] = -log_sigmoid(x[test] @ heads)
    return losses


def choose_penalty(x: np.ndarray, fold: np.ndarray, kept: np.ndarray | None = None) -> float:
    """The penalty with the least cross-validated log-loss over all pairs, each with weight 1.

    Choose it before pairs are selected. Pairs that a rule kept because they agree with a head look separable, and
    cross-validation on them (``kept``) takes the smallest penalty there is, which serves no other pair.

    Args:
        x: [N, D], all pairs, also those that are left out of the training afterwards.
        fold: [N], pairs that share texts in one.
        kept: bool [N], train and judge on these alone, to show what that would choose; None: all.
    """
    weights = np.ones(len(x)) if kept is None else kept.astype(np.float64)
    return PENALTIES[int((weights @ held_out_losses(x, weights, fold)).argmin())]
