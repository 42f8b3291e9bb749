"""Agreement of two judges on the same completions: Cohen's kappa of their verdicts, rank correlation. Pure.

Each completion of a policy is compared with the reference's for the same prompt. Prompts are the independent units.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from align.stats import correlation, jackknife_interval, share_interval

VERDICTS = (-1.0, 0.0, 1.0)
"""The policy's completion is worse than the reference's, as good, better."""


def agreements(advantages: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Agreement of every two judges.

    Args:
        advantages: judge -> how much better it finds each policy's completion than the reference's: a difference of
            scores, or a preference minus 0.5, [policies, prompts]. The sign is the verdict; 0 is a tie.

    Returns:
        ``[{"a", "b", "kappa", "rank_correlation", "same_verdict"}]``: estimates with 95% intervals over prompts as JSON
        values, None where a judge gives one verdict, or one value, for all.
    """
    found = []
    for (a, first), (b, second) in combinations(advantages.items(), 2):
        prompts = np.tile(np.arange(first.shape[1]), first.shape[0])
        one, other = first.ravel(), second.ravel()
        same = (np.sign(one) == np.sign(other)).astype(float)
        found.append(
            {
                "a": a,
                "b": b,
                "kappa": cohens_kappa(np.sign(one), np.sign(other), prompts),
                "rank_correlation": correlation(rankdata(one), rankdata(other), clusters=prompts),
                "same_verdict": share_interval(same, clusters=prompts).to_dict(),
            }
        )
    return found


def cohens_kappa(first: np.ndarray, second: np.ndarray, clusters: np.ndarray) -> dict[str, Any] | None:
    """Cohen's kappa of verdicts [N] and [N] (Educational and Psychological Measurement 20 (1960) 37-46): agreement
    beyond what the judges' shares of each verdict give by chance, 1 for full and 0 for chance agreement.

    The interval is the jackknife's over clusters [N]. None if both give one and the same verdict throughout.
    """
    codes = np.searchsorted(VERDICTS, first) * len(VERDICTS) + np.searchsorted(VERDICTS, second)
    units = int(clusters.max()) + 1
    tables = np.zeros((units, len(VERDICTS) ** 2))
    np.add.at(tables, (clusters, codes), 1)
    total = tables.sum(axis=0)
    value, left = float(_kappa(total[None])[0]), _kappa(total - tables)
    if not np.isfinite(value):
        return None
    if units < 2 or not np.isfinite(left).all():
        return {"value": value, "low": None, "high": None, "n": len(first)}
    estimate = jackknife_interval(value, left, n=len(first)).to_dict()
    ends = {end: None if estimate[end] is None else float(np.clip(estimate[end], -1, 1)) for end in ("low", "high")}
    return estimate | ends


def _kappa(tables: np.ndarray) -> np.ndarray:
    """Kappa [G] of the contingency tables [G, 9]; NaN where chance agreement is certain."""
    shares = tables.reshape(-1, len(VERDICTS), len(VERDICTS))
    shares = shares / shares.sum(axis=(1, 2), keepdims=True)
    seen = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1 - 1e-12, (seen - chance) / (1 - chance), np.nan)
