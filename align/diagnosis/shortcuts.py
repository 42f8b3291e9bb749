"""How much of the labels a reader could give who sees only the surface of the responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import RESPONSES
from align.data.splits import clusters_of, folds_of_clusters
from align.data.text import plain
from align.diagnosis.surface import SHORTCUTS, first_words, indicators
from align.stats import share_interval
from align.trust.newton import minimize_by_newton

FOLDS = 5
PENALTIES = np.array([1.0, 10.0, 100.0, 1000.0])
"""L2 penalties on standardized features; the one with the best cross-validated log-loss is used."""
FEWEST = 40
"""Pairs below which nothing is fitted."""
FEWEST_CLUSTERS = 20
"""Groups of pairs without a text in common below which nothing is fitted."""
ALARMS = 0.05
"""Probability of any false alarm over all shortcuts of a table (Bonferroni)."""
POLICY_COLUMNS = ("model", "policy", "source")
"""Columns ``chosen_<name>`` and ``rejected_<name>`` that say who wrote a response."""
EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Shortcut:
    """What one kind of surface gives away."""

    name: str
    accuracy: dict[str, Any]
    """Share of held-out labels that it predicts, with its interval; 0.5 is nothing."""
    alarm: bool
    """Whether it is above 0.5 beyond what ``ALARMS`` allows to chance."""
    examples: list[str]
    """Ids of pairs about which it is surest, and right."""


def find_shortcuts(pairs: Dataset, *, seed: int = 0, own: Sequence[str] = ()) -> list[Shortcut]:
    """Predict the label of held-out pairs from each kind of surface alone, and from all together.

    The model is a logistic regression without intercept on the difference of the features of the two responses, so it
    knows nothing of which response stands first. Pairs that share texts stay in one fold (``clusters_of``).

    Args:
        pairs: pair table with ``id``.
        seed: of the folds.
        own: columns of the source; ``chosen_model`` and ``rejected_model`` are used if both are there.

    Returns:
        One entry per kind, then ``all together``; an empty list for fewer than ``FEWEST`` pairs or ``FEWEST_CLUSTERS``.
    """
    clusters = clusters_of(pairs)
    if len(pairs) < FEWEST or len(np.unique(clusters)) < FEWEST_CLUSTERS:
        return []
    fold = folds_of_clusters(clusters, FOLDS, seed)
    features = _features(pairs, own)
    features["all together"] = np.concatenate(list(features.values()), axis=1)
    level = ALARMS / len(features)
    found = []
    for name, x in features.items():
        score = held_out_scores(x, fold)
        right = np.where(score == 0, 0.5, score > 0)
        surest = np.argsort(-score, kind="stable")[:EXAMPLES]
        found.append(
            Shortcut(
                name,
                share_interval(right, clusters=clusters).to_dict(),
                _above_chance(right, clusters, level),
                [str(pairs[int(k)]["id"]) for k in surest if score[k] > 0],
            )
        )
    return found


def held_out_scores(x: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Logit of the label of each pair by a fit on the other folds, [N]; 0 where the features do not differ.

    Args:
        x: differences of features, chosen minus rejected, [N, D].
        fold: [N].
    """
    scale = np.sqrt(np.square(x).mean(axis=0))
    x = x[:, scale > 0] / scale[scale > 0]
    if not x.shape[1]:
        return np.zeros(len(fold))
    scores = np.zeros((len(fold), len(PENALTIES)))
    for part in np.unique(fold):
        inside = fold == part
        scores[inside] = x[inside] @ _fit(x[~inside])
    best = int(np.logaddexp(0.0, -scores).sum(axis=0).argmin())
    return scores[:, best]


def _fit(x: np.ndarray) -> np.ndarray:
    """Weights [D, penalties] of logistic regressions in which every pair is labeled chosen over rejected."""

    def derivatives(logits: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = 1 / (1 + np.exp(np.clip(logits, -500, 500)))
        return -p, p * (1 - p)

    shape = (x.shape[1], len(PENALTIES))
    return minimize_by_newton(x, derivatives, np.zeros(shape), np.broadcast_to(PENALTIES, shape))


def _above_chance(right: np.ndarray, clusters: np.ndarray, level: float) -> bool:
    """Whether the mean is above 0.5 at ``level`` over clusters, by a one-sided t test and by a sign test.

    The t test alone is wrong too often for few clusters that are right or wrong as a whole.
    """
    from scipy.stats import binomtest
    from scipy.stats import t as student

    codes = np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(codes, weights=right - 0.5)
    count = len(sums)
    spread = float(np.sqrt(np.square(sums - sums.mean()).sum() / (count - 1)))
    wins, losses = int((sums > 0).sum()), int((sums < 0).sum())
    if not wins or binomtest(wins, wins + losses, alternative="greater").pvalue > level:
        return False
    return bool(spread == 0 or sums.mean() / spread * np.sqrt(count) > student.ppf(1 - level, count - 1))


def _features(pairs: Dataset, own: Sequence[str]) -> dict[str, np.ndarray]:
    """Name of each kind -> differences of its features, [N, D]."""
    chosen, rejected = ([plain(text) for text in pairs[name]] for name in RESPONSES)
    found = {
        name: np.array([feature(text) for text in chosen]) - np.array([feature(text) for text in rejected])
        for name, feature in SHORTCUTS.items()
    }
    starts = [[[first_words(text, n) for text in side] for side in (chosen, rejected)] for n in (1, 2)]
    found["first words"] = np.concatenate([indicators(better, worse) for better, worse in starts], axis=1)
    for name in POLICY_COLUMNS:
        columns = [f"{side}_{name}" for side in RESPONSES]
        if set(columns) <= set(own) and set(columns) <= set(pairs.column_names):
            better, worse = ([str(value) for value in pairs[one]] for one in columns)
            found[f"who wrote it ({name})"] = indicators(better, worse)
    return found
