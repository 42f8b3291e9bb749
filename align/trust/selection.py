"""Choice of (t, g): held-out labels rule settings out, the evidence decides among the rest."""

from dataclasses import dataclass

import numpy as np

from align.stats import cluster_codes
from align.trust.linear_proxy import DPO, Family, HeldOut, Setting, without_leak

RESAMPLES = 500
ERRORS = 1.0
"""One-standard-error rule: held-out labels do not separate policies that are nearer."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A setting of the family, by its indices."""

    setting: int
    """Index in the grid."""
    spread: int
    """Index of the prior spread (the ridge)."""


def choose(
    heldout: HeldOut,
    theta: np.ndarray,
    proposal: np.ndarray,
    features: np.ndarray,
    family: Family,
    *,
    same_labels: bool,
    clusters: np.ndarray | None = None,
) -> Selection:
    """Choose the setting to train with.

    Margins that contradict the labels at least as often as they agree (slope 0) are not used: DPO. Margins that were
    cross-fitted on these labels carry no independent information: held-out labels alone decide, corrected for the leak.
    Otherwise, of the policies within one standard error of the best on held-out labels, the one that agrees best with
    the evidence is chosen.

    Args:
        heldout: from ``held_out``; ``theta`` was trained with its slope.
        theta: [D, settings, spreads], trained on all pairs.
        proposal: [D], the evidence's policy.
        features: x [N, D].
        family: what was trained.
        same_labels: whether the margins were cross-fitted on the labels that judge them.
        clusters: cluster [N] of every pair; None: each pair is one.
    """
    if heldout.slope == 0:
        return by_labels(heldout.loglik, np.array([setting == DPO for setting in family.grid]))
    if same_labels:
        return by_labels(without_leak(heldout, family))
    left = undecided(heldout.loglik, by_labels(heldout.loglik), ERRORS, clusters)
    return by_evidence(theta, proposal, features, left)


def by_labels(loglik: np.ndarray, allowed: np.ndarray | None = None) -> Selection:
    """The setting with the highest mean held-out log-likelihood.

    Args:
        loglik: [N, settings, spreads].
        allowed: bool [settings]; None: all.
    """
    mean = loglik.mean(axis=0)
    if allowed is not None:
        mean = np.where(allowed[:, None], mean, -np.inf)
    setting, spread = np.unravel_index(int(mean.argmax()), mean.shape)
    return Selection(int(setting), int(spread))


def undecided(loglik: np.ndarray, best: Selection, errors: float, clusters: np.ndarray | None = None) -> np.ndarray:
    """bool [settings, spreads]: mean log-likelihood within ``errors`` standard errors of that of ``best``; the standard
    error is that of the difference."""
    difference = loglik - loglik[:, best.setting, best.spread][:, None, None]
    allowed: np.ndarray = difference.mean(axis=0) >= -errors * standard_error(difference, clusters)
    return allowed


def cluster_sums(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Sums [G, ...] of values [N, ...] over the clusters [N]; the values themselves without clusters."""
    which = cluster_codes(clusters)
    if which is None:
        return values
    order = np.argsort(which, kind="stable")
    starts = np.flatnonzero(np.diff(which[order], prepend=-1))
    sums: np.ndarray = np.add.reduceat(values[order], starts, axis=0)
    return sums


def standard_error(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Standard error [...] of the mean of values [N, ...] over clusters [N]."""
    error: np.ndarray = np.sqrt(np.square(cluster_sums(values - values.mean(axis=0), clusters)).sum(axis=0))
    return error / len(values)


def by_evidence(theta: np.ndarray, proposal: np.ndarray, features: np.ndarray, allowed: np.ndarray) -> Selection:
    """The allowed policy that agrees best with the evidence's.

    The agreement is the uncentered correlation of the two implicit margins over the pairs: if the evidence's policy is
    the truth, the reward gained per sqrt(2 KL) by a policy near the reference.

    Args:
        theta: [D, settings, spreads].
        proposal: [D].
        features: x [N, D].
        allowed: bool [settings, spreads], at least one true.
    """
    covariance = features.T @ features
    flat = theta.reshape(len(theta), -1)
    size = np.sqrt((flat * (covariance @ flat)).sum(axis=0))
    agreement = np.where(size > 0, flat.T @ (covariance @ proposal) / np.maximum(size, 1e-300), -np.inf)
    agreement = np.where(allowed, agreement.reshape(allowed.shape), -np.inf)
    setting, spread = np.unravel_index(int(agreement.argmax()), agreement.shape)
    return Selection(int(setting), int(spread))


def bootstrap(
    loglik: np.ndarray, grid: tuple[Setting, ...], *, seed: int, clusters: np.ndarray | None = None
) -> dict[str, tuple[float, float]]:
    """Bootstrap over clusters: 95% intervals of the trust and strength that held-out labels alone choose."""
    sums = cluster_sums(loglik.reshape(len(loglik), -1), clusters)
    which = cluster_codes(clusters)
    sizes = np.ones(len(sums)) if which is None else np.bincount(which).astype(np.float64)
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(RESAMPLES):
        counts = np.bincount(rng.integers(0, len(sums), len(sums)), minlength=len(sums))
        mean = counts @ sums / (counts @ sizes)
        chosen.append(int(mean.argmax()) // loglik.shape[2])
    intervals = {}
    for name in ("trust", "strength"):
        low, high = np.quantile([getattr(grid[k], name) for k in chosen], [0.025, 0.975])
        intervals[name] = (float(low), float(high))
    return intervals
