"""Select preference pairs by the scores of one prompt's completions. Pure; a better completion has a higher score."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

Mode = Literal["best_worst", "band", "all", "adjacent"]
ANY_BAND = (0.0, float("inf"))
"""A band that every difference is in."""
Chosen = tuple[int, int]
"""Index of the chosen and of the rejected completion."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Guard against false negatives: rejected completions that are as good as the chosen one.

    A pair is dropped if its scores differ by less than ``margin``, or if the rejected score is above ``ratio`` times
    the chosen one. The ratio needs probabilities: rewards have no zero, and adding a constant to all of them must not
    change which pairs are kept (LG-ANNA-Embedding, arXiv 2506.07438, uses 0.95 on similarities; UniME-V2, arXiv
    2510.13515, a margin of 0.01 on P(yes)).
    """

    margin: float = 0.0
    """Least difference of the scores, >= 0. Equal scores never make a pair."""
    ratio: float | None = None
    """In (0, 1], for scores in [0, 1]."""

    def passes(self, chosen: float, rejected: float) -> bool:
        """Whether to keep a pair with these scores."""
        apart = chosen > rejected and chosen - rejected >= self.margin
        return apart and (self.ratio is None or rejected <= self.ratio * chosen)


def choose_pairs(
    scores: Sequence[float], mode: Mode, guard: Guard, *, band: tuple[float, float] = ANY_BAND
) -> tuple[list[Chosen], int]:
    """Return (pairs, number of pairs that ``mode`` chose and ``guard`` dropped). Ties go to the smaller index.

    ``best_worst`` pairs the best completion with the worst. ``band`` pairs the best with its hardest negative: the best
    completion among those whose margin to it lies within ``band``. ``all`` pairs every two of the K completions, the
    better one chosen: K (K - 1) / 2 pairs. ``adjacent`` pairs each completion with the next worse one: K - 1 pairs.

    Args:
        scores: scores of the K completions of one prompt.
        mode: which pairs to choose.
        guard: which of them to drop.
        band: least and largest margin, for ``band``.
    """
    if len(scores) < 2:
        return [], 0
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    best = order[0]
    if mode == "best_worst":
        wanted = [(best, order[-1])]
    elif mode == "band":
        low, high = band
        inside = [k for k in order[1:] if low <= scores[best] - scores[k] <= high]
        wanted = [(best, inside[0])] if inside else []
    elif mode == "adjacent":
        wanted = list(pairwise(order))
    else:
        wanted = list(combinations(order, 2))
    kept = [pair for pair in wanted if guard.passes(scores[pair[0]], scores[pair[1]])]
    return kept, len(wanted) - len(kept)


def draw_pair(rewards: Sequence[float], scale: float, rng: np.random.Generator) -> Chosen:
    """Pair the best completion with the worst; Bradley-Terry draws the chosen: P(best) = sigmoid(scale * difference).

    Args:
        rewards: rewards of the K >= 2 completions of one prompt; if all are equal, the first and last are the pair.
        scale: factor of the rewards; the larger it is, the fewer labels contradict them.
        rng: drawn from once.
    """
    order = sorted(range(len(rewards)), key=lambda k: (-rewards[k], k))
    best, worst = order[0], order[-1]
    is_best = rng.random() < 1.0 / (1.0 + np.exp(-scale * (rewards[best] - rewards[worst])))
    return (best, worst) if is_best else (worst, best)
