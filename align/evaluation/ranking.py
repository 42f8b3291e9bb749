"""How well absolute rewards order responses across prompts and categories. Pure.

Pair accuracy compares the two responses of one prompt. A filter threshold, a best-of-n floor or a ranking of prompts
compares responses of different prompts; the global AUC and the OPIS measure that.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit
from scipy.stats import rankdata

from align.stats import FEWEST_UNITS, Estimate, cluster_codes, influence_interval, share_interval

FALSE_ACCEPTS = (0.01, 0.10)
THRESHOLDS = 101
PERMUTATIONS = 200


@dataclass(frozen=True, slots=True)
class ThresholdConsistency:
    """Whether one reward threshold means the same in every category."""

    value: float
    """OPIS, in [0, 0.25]; 0: at every threshold all categories have the same utility."""
    chance: float
    """Mean OPIS with the categories shuffled over the units: its expected value if the categories do not differ."""
    chance_high: float
    """95% quantile of the OPIS with shuffled categories."""
    categories: dict[str, float]
    """Category -> its mean squared distance from the mean utility; ``value`` is their mean."""
    units: int
    """Number of independent units that were shuffled: pairs, or the pairs of a cluster in a category."""

    @property
    def differs(self) -> bool:
        """Whether the OPIS is larger than chance explains, with at least ``FEWEST_UNITS`` units behind it."""
        return self.units >= FEWEST_UNITS and self.value > self.chance_high

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "differs": self.differs}


def auc(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """P(a chosen response's reward > a rejected one's), over all pairs of prompts; ties count half.

    Args:
        chosen: rewards [N].
        rejected: rewards [M].
    """
    high, low = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    ranks = rankdata(np.concatenate([high, low]))[: high.size]
    return float((ranks.sum() - high.size * (high.size + 1) / 2) / (high.size * low.size))


def auc_interval(chosen: np.ndarray, rejected: np.ndarray, *, clusters: ArrayLike | None = None) -> Estimate:
    """The global AUC with its 95% interval over the N pairs, or over clusters [N] of pairs.

    A pair's influence is the sum of the placements of its two rewards among all rewards of the other side (DeLong et
    al., Biometrics 44 (1988) 837-845), which counts the correlation of a pair's two rewards. The interval is taken on
    the scale of log-odds; where every chosen reward is above, or below, every rejected one it is Wilson's.
    """
    value = auc(chosen, rejected)
    if value in (0.0, 1.0):
        return share_interval(np.full(chosen.size, value), clusters=clusters)
    high, low = np.sort(chosen), np.sort(rejected)
    size = chosen.size
    of_chosen = (np.searchsorted(low, chosen, "left") + np.searchsorted(low, chosen, "right")) / (2 * size)
    of_rejected = 1 - (np.searchsorted(high, rejected, "left") + np.searchsorted(high, rejected, "right")) / (2 * size)
    influence = (of_chosen - value + of_rejected - value) / (value * (1 - value))
    which = cluster_codes(clusters)
    sizes = None if which is None else np.bincount(which)
    if which is not None:
        influence = np.bincount(which, weights=influence) * (int(which.max()) + 1) / size
    found = influence_interval(float(logit(value)), influence, n=size, sizes=sizes)
    ends = [None if end is None else float(expit(end)) for end in (found.low, found.high)]
    return replace(found, value=value, low=ends[0], high=ends[1])


def utilities(
    chosen: np.ndarray,
    rejected: np.ndarray,
    category: np.ndarray,
    *,
    false_accepts: tuple[float, float] = FALSE_ACCEPTS,
) -> np.ndarray:
    """Utility [C, D] of each category at each of ``THRESHOLDS`` common thresholds.

    The utility of category i at threshold d is 2 s t / (s + t), where s is the share of its chosen responses above d
    and t the share of its rejected responses not above d. The thresholds are observed rewards at which 1% to 10% of
    all rejected responses are accepted, so a monotone transform of the rewards does not change the result.

    Args:
        chosen: rewards [N].
        rejected: rewards [N].
        category: index of the category of each pair, [N]; all of 0..C-1 occur.
        false_accepts: smallest and largest share of accepted rejected responses.
    """
    levels = 1 - np.linspace(false_accepts[0], false_accepts[1], THRESHOLDS)
    thresholds = np.quantile(rejected, levels, method="inverted_cdf")
    made = []
    for k in range(int(category.max()) + 1):
        high, low = np.sort(chosen[category == k]), np.sort(rejected[category == k])
        sensitivity = 1 - np.searchsorted(high, thresholds, side="right") / high.size
        specificity = np.searchsorted(low, thresholds, side="right") / low.size
        total = sensitivity + specificity
        made.append(np.where(total > 0, 2 * sensitivity * specificity / np.where(total > 0, total, 1), 0.0))
    return np.stack(made)


def opis(
    chosen: ArrayLike,
    rejected: ArrayLike,
    category: Sequence[str],
    *,
    seed: int,
    clusters: ArrayLike | None = None,
    permutations: int = PERMUTATIONS,
) -> ThresholdConsistency:
    """Operating-point inconsistency score over categories (Zhang et al., arXiv 2307.04047): variance of the utilities.

    The level of chance is that of shuffled categories. Pairs of a cluster have something in common, so those of one
    category move together; the OPIS is above 0 if categories differ in the level of the rewards or in how well the
    rewards separate their pairs.

    Args:
        chosen: rewards [N].
        rejected: rewards [N].
        category: category of each pair, [N].
        seed: seed of the shuffles.
        clusters: cluster label of each pair, [N] (``clusters_of``); None: pairs are independent.
        permutations: number of shuffles that ``chance`` is estimated from.

    Raises:
        ValueError: fewer than two categories.
    """
    high, low = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    names, which = np.unique(np.asarray(category, dtype=str), return_inverse=True)
    if names.size < 2:
        raise ValueError(f"OPIS needs at least two categories, got {names.size}")
    shares = _spread(utilities(high, low, which))
    rng = np.random.default_rng(seed)
    labels = np.arange(high.size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    first, unit = np.unique(np.stack([labels, which]), axis=1, return_index=True, return_inverse=True)[1:]
    of_unit, unit = which[first], unit.reshape(-1)
    null = [_spread(utilities(high, low, rng.permutation(of_unit)[unit])).mean() for _ in range(permutations)]
    return ThresholdConsistency(
        value=float(shares.mean()),
        chance=float(np.mean(null)),
        chance_high=float(np.quantile(null, 0.95)),
        categories={str(name): float(share) for name, share in zip(names, shares, strict=True)},
        units=int(of_unit.size),
    )


def _spread(found: np.ndarray) -> np.ndarray:
    """Mean squared distance [C] of each category's utilities [C, D] from the mean over categories."""
    return ((found - found.mean(axis=0)) ** 2).mean(axis=1)
