"""The value of best-of-n at every n up to N, estimated from N samples of each prompt. Pure.

Best-of-n answers with the best of n samples under a score. N samples have C(N, n) subsets of size n, and the mean over
all subsets is the unbiased estimate of smallest variance (Nakano et al., arXiv 2112.09332, appendix I): the sum over
the ranks i = 0..N-1, 0 the worst, of C(i, n - 1) / C(N, n) times the value of the sample of rank i.
"""

import math
from collections.abc import Sequence

import numpy as np


def best_of_weights(count: int) -> np.ndarray:
    """P(the sample of rank i is the best of n drawn without replacement out of N), [N, N]: row n - 1, column i.

    Ranks run from 0, the worst. Each row sums to 1; the first is 1 / N everywhere, the last 1 at the best alone.

    Args:
        count: N, at least 1.
    """
    weights = np.zeros((count, count))
    for n in range(1, count + 1):
        weights[n - 1, count - 1] = n / count
        for rank in range(count - 1, n - 1, -1):
            weights[n - 1, rank - 1] = weights[n - 1, rank] * (rank - n + 1) / rank
    return weights


def best_index(scores: Sequence[float]) -> int:
    """Index of the largest score; the first one if several are equal."""
    return max(range(len(scores)), key=lambda k: (scores[k], -k))


def expected_best(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean value of the best of n samples by score, [P, N], column n - 1 for n = 1..N.

    Args:
        scores: scores of N samples of each of P prompts, [P, N]; the first of equal scores wins.
        values: values to average, [P, N]: the same scores, or those of another judge.
    """
    prompts, count = scores.shape
    order = np.lexsort((np.broadcast_to(-np.arange(count), scores.shape), scores), axis=1)
    ranked = np.take_along_axis(values, order, axis=1)
    return np.asarray(ranked @ best_of_weights(count).T).reshape(prompts, count)


def kl_bound(n: int) -> float:
    """Upper bound log n - (n - 1) / n of KL(best-of-n || sampling policy), nats per completion (arXiv 2401.01879).

    The bound is reached if no two samples can have the same score.
    """
    return math.log(n) - (n - 1) / n
