"""Which (t, g): held-out labels rule out, evidence proposes among what they leave."""

from dataclasses import dataclass

import numpy as np

from align.trust.linear_proxy import DPO, Family, HeldOut, Setting, without_leak

RESAMPLES = 500
ERRORS = 1.0
"""Standard errors within which held-out labels cannot tell two policies apart."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A setting of the family."""

    setting: int
    """Index in the grid."""
    spread: int
    """Index of the prior spread (the ridge)."""


def choose(
    found: HeldOut, theta: np.ndarray, proposal: np.ndarray, features: np.ndarray, family: Family, *, same_labels: bool
) -> Selection:
    """The policy to train.

    Margins that contradict the labels as often as not (slope 0) are left alone. Margins made from these same labels are
    no second witness: held-out labels alone decide, the margins' leak taken off. Otherwise held-out labels rule out,
    and of the policies that they cannot tell from the best the evidence takes the one that agrees best with it.

    Args:
        found: of ``held_out``; its slope is the one that ``theta`` was trained with.
        theta: [D, settings, spreads], trained on all pairs.
        proposal: [D], the evidence's policy.
        features: x [N, D].
        family: what was trained.
        same_labels: whether the margins were cross-fitted on the labels that judge them.
    """
    if found.slope == 0:
        return by_labels(found.loglik, np.array([setting == DPO for setting in family.grid]))
    if same_labels:
        return by_labels(without_leak(found, family))
    return by_evidence(theta, proposal, features, undecided(found.loglik, by_labels(found.loglik), ERRORS))


def by_labels(loglik: np.ndarray, allowed: np.ndarray | None = None) -> Selection:
    """The policy under which held-out labels are most likely.

    Args:
        loglik: [N, settings, spreads].
        allowed: [settings], where the choice is between some settings only.
    """
    mean = loglik.mean(axis=0)
    if allowed is not None:
        mean = np.where(allowed[:, None], mean, -np.inf)
    setting, spread = np.unravel_index(int(mean.argmax()), mean.shape)
    return Selection(int(setting), int(spread))


def undecided(loglik: np.ndarray, best: Selection, errors: float) -> np.ndarray:
    """[settings, spreads], true where held-out labels are less likely than under ``best`` by no more than ``errors``
    standard errors of the difference."""
    difference = loglik - loglik[:, best.setting, best.spread][:, None, None]
    return difference.mean(axis=0) >= -errors * difference.std(axis=0) / np.sqrt(len(loglik))


def by_evidence(theta: np.ndarray, proposal: np.ndarray, features: np.ndarray, allowed: np.ndarray) -> Selection:
    """Of the allowed policies the one that agrees best with the evidence's.

    The agreement is the correlation of the two implicit margins over the pairs: for policies near the reference the
    reward gained per sqrt(2 KL) where the evidence's policy is the truth.

    Args:
        theta: [D, settings, spreads].
        proposal: [D].
        features: x [N, D].
        allowed: [settings, spreads], at least one true.
    """
    covariance = features.T @ features
    flat = theta.reshape(len(theta), -1)
    size = np.sqrt((flat * (covariance @ flat)).sum(axis=0))
    agreement = np.where(size > 0, flat.T @ (covariance @ proposal) / np.maximum(size, 1e-300), -np.inf)
    agreement = np.where(allowed, agreement.reshape(allowed.shape), -np.inf)
    setting, spread = np.unravel_index(int(agreement.argmax()), agreement.shape)
    return Selection(int(setting), int(spread))


def bootstrap(loglik: np.ndarray, grid: tuple[Setting, ...], *, seed: int) -> dict[str, tuple[float, float]]:
    """95% intervals, over resampled pairs, of the trust and strength that held-out labels alone choose."""
    flat = loglik.reshape(len(loglik), -1)
    rng = np.random.default_rng(seed)
    counts = np.stack(
        [np.bincount(rng.integers(0, len(flat), len(flat)), minlength=len(flat)) for _ in range(RESAMPLES)]
    )
    chosen = (counts @ flat).argmax(axis=1) // loglik.shape[2]
    found = {}
    for name in ("trust", "strength"):
        low, high = np.quantile([getattr(grid[k], name) for k in chosen], [0.025, 0.975])
        found[name] = (float(low), float(high))
    return found
