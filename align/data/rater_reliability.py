"""How reliable each rater is, and what the raters of a pair say together, from their votes alone.

The one-coin model of Dawid and Skene (1979): every pair has a better response, each as likely as the other, and rater j
names it with probability p_j, independently of the others. Two raters then agree more often than not by the product of
(2 p_j - 1) and (2 p_k - 1), which determines these numbers where the raters who share pairs form a cycle of odd length
(three raters of one pair do), up to the sign of all: raters are assumed to be right more often than wrong.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from align.errors import DataError, listed

PRIOR = 1.0
"""Votes that every rater is given beforehand, right and wrong each, so that none is infallible after a few votes."""
STEPS, TOLERANCE = 10_000, 1e-10
"""Iterations of EM, at most; largest change of a reliability at which they end."""


class Vote(NamedTuple):
    """One vote of one rater."""

    pair: str
    rater: str
    first: bool
    """Whether the rater preferred the first response."""


class Reliability(NamedTuple):
    """What ``rater_reliability`` finds."""

    raters: dict[str, float]
    """Probability that a rater names the better response."""
    pairs: dict[str, float]
    """Probability that the first response of a pair is the better one."""


def rater_reliability(votes: Sequence[Vote]) -> Reliability:
    """Estimate both by EM, at the largest posterior density under a weak prior (``PRIOR``).

    Raises:
        DataError: the votes do not determine the reliability of some raters (names them), or a rater votes on a pair
            twice.
    """
    raters, pairs = (sorted({getattr(vote, name) for vote in votes}) for name in ("rater", "pair"))
    _refuse_twice(votes)
    _refuse_undetermined(votes, raters)
    rater, pair = _places(votes, raters, "rater"), _places(votes, pairs, "pair")
    first = np.array([vote.first for vote in votes], dtype=np.float64)
    better = _mean(first, pair, len(pairs))  # the majority
    reliable = np.full(len(raters), 0.5)
    for _ in range(STEPS):
        right = np.where(first == 1, better[pair], 1 - better[pair])
        counts = np.bincount(rater, minlength=len(raters))
        found = (np.bincount(rater, weights=right, minlength=len(raters)) + PRIOR) / (counts + 2 * PRIOR)
        odds = np.log(found) - np.log1p(-found)
        better = 1 / (1 + np.exp(-np.bincount(pair, weights=(2 * first - 1) * odds[rater], minlength=len(pairs))))
        change = float(np.abs(found - reliable).max())
        reliable = found
        if change < TOLERANCE:
            break
    return Reliability(
        dict(zip(raters, reliable.tolist(), strict=True)), dict(zip(pairs, better.tolist(), strict=True))
    )


def _places(votes: Sequence[Vote], names: Sequence[str], kind: str) -> np.ndarray:
    place = {name: k for k, name in enumerate(names)}
    return np.array([place[getattr(vote, kind)] for vote in votes], dtype=np.int64)


def _mean(values: np.ndarray, place: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(place, weights=values, minlength=count) / np.bincount(place, minlength=count)


def _refuse_twice(votes: Sequence[Vote]) -> None:
    seen: set[tuple[str, str]] = set()
    for vote in votes:
        if (vote.pair, vote.rater) in seen:
            raise DataError(
                f"rater {vote.rater!r}: found two votes on pair {vote.pair}, expected one: a rater's votes on one pair "
                "are not independent",
                code="raters",
                hint="keep one of them",
            )
        seen.add((vote.pair, vote.rater))


def _refuse_undetermined(votes: Sequence[Vote], raters: Sequence[str]) -> None:
    """Raise if raters who share pairs, directly or through others, form no cycle of odd length."""
    shared: dict[str, set[str]] = defaultdict(set)
    of_pair: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        of_pair[vote.pair].append(vote.rater)
    for together in of_pair.values():
        for one in together:
            shared[one].update(other for other in together if other != one)
    side: dict[str, int] = {}
    undetermined: list[str] = []
    for start in raters:
        if start in side:
            continue
        side[start], group, odd, left = 0, [start], False, [start]
        while left:
            one = left.pop()
            for other in shared[one]:
                if other not in side:
                    side[other] = 1 - side[one]
                    group.append(other)
                    left.append(other)
                odd = odd or side[other] == side[one]
        undetermined += [] if odd else group
    if undetermined:
        raise DataError(
            f"raters: found {len(undetermined)} of {len(raters)} whose reliability the votes do not determine, "
            f"expected raters who share pairs in threes (or in another odd cycle):\n{listed(sorted(undetermined))}",
            code="raters",
            hint="use --view votes, which believes all raters equally, or collect votes of three raters on some pairs",
        )
