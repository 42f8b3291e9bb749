"""Linear policies on frozen features, trained under every setting and evaluated on held-out labels.

A policy near its reference has log-ratio gaps that are linear in the features of its last layer, so a linear model of
the pair's feature difference x stands in for the policy: beta h = x theta. It is trained with the policy's loss
(align/losses/margin_weights.py: ``trusted_label``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import expit

from align.losses.margin_weights import MADPO_TAU, trusted_label
from align.trust.newton import minimize_by_newton
from align.trust.slope import calibrated_slope

TRUSTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
STRENGTHS = (0.0, 0.5, 1.0)
SPREADS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
"""Prior standard deviations of x theta, from a policy that learns next to nothing to an unregularized one. Each is a
ridge penalty that stands for a policy's learning rate and number of steps."""


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """Trust t in the margin, strength g of MADPO's weight on the label's part."""

    trust: float
    strength: float


DPO, MADPO, SOFT = Setting(0.0, 0.0), Setting(0.0, 1.0), Setting(1.0, 0.0)
GRID = (*(Setting(t, g) for t in TRUSTS if t < 1 for g in STRENGTHS), SOFT)
"""Every (t, g); at t = 1 the label has no weight, so g has no effect."""


@dataclass(frozen=True, slots=True)
class MadpoShape:
    """Parameters of MADPO's weight."""

    c_max: float = 2.0
    c_min: float = 0.5
    lam: float = 1.0
    tau: float = MADPO_TAU


@dataclass(frozen=True, slots=True)
class Family:
    """The losses and ridges to try; column k * len(spreads) + j is grid[k] at spreads[j]."""

    grid: tuple[Setting, ...] = GRID
    spreads: tuple[float, ...] = SPREADS
    madpo: MadpoShape = field(default_factory=MadpoShape)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Cross-validated log-likelihoods of labels."""

    loglik: np.ndarray
    """[N, settings, spreads], nats: log-likelihood of each pair's label, mean over the repeats."""
    margin_alone: np.ndarray
    """[N], nats: log sigmoid(b m) with the slope fitted on the other folds."""
    slope: float
    """b calibrated on all pairs."""


def scaled(features: np.ndarray) -> np.ndarray:
    """Scale features [N, D] so that the mean of |x|^2 is D; they are not centered, since a difference has a sign."""
    return features / np.sqrt(np.square(features).mean())


def fit(features: np.ndarray, margin: np.ndarray, slope: float, family: Family) -> np.ndarray:
    """Train every policy on all pairs; theta [D, settings, spreads].

    Args:
        features: x [N, D] from ``scaled``.
        margin: m [N].
        slope: b.
        family: what to train.
    """
    target, weight = _labels(margin, slope, family)
    size, count = features.shape[1], len(family.spreads)
    ridge = np.tile(size / np.square(family.spreads), len(family.grid))

    def derivatives(logits: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, w = expit(logits), weight[:, settings // count]
        return w * (p - target[:, settings // count]), w * p * (1 - p)

    theta = minimize_by_newton(features, derivatives, np.zeros((size, len(ridge))), np.tile(ridge, (size, 1)))
    return theta.reshape(size, len(family.grid), count)


def held_out(
    features: np.ndarray,
    margin: np.ndarray,
    folds: Sequence[np.ndarray],
    family: Family,
    *,
    share: float = 1.0,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> HeldOut:
    """Cross-validate: log-likelihood of every label under policies and a slope fitted on the other folds.

    Args:
        features: x [N, D] from ``scaled``.
        margin: m [N].
        folds: for each repeat the fold [N] of every pair.
        family: what to train.
        share: share of the clusters of the other folds to train on, drawn at random (learning curves).
        clusters: cluster [N] of every pair; None: each pair is one.
        seed: seed of the draw.
    """
    which = np.arange(len(margin)) if clusters is None else clusters
    rng = np.random.default_rng(seed)
    loglik = np.zeros((len(margin), len(family.grid), len(family.spreads)))
    alone = np.zeros(len(margin))
    overall = calibrated_slope(margin)
    for fold in folds:
        for number in np.unique(fold):
            test = fold == number
            train = np.flatnonzero(~test)
            if share < 1:
                names = rng.permutation(np.unique(which[train]))
                train = train[np.isin(which[train], names[: max(1, round(share * len(names)))])]
            slope = calibrated_slope(margin[train]) if (margin[train] < 0).any() else overall
            theta = fit(features[train], margin[train], slope, family)
            loglik[test] += log_sigmoid(np.tensordot(features[test], theta, axes=1))
            alone[test] += log_sigmoid(slope * margin[test])
    return HeldOut(loglik / len(folds), alone / len(folds), overall)


def without_leak(heldout: HeldOut, family: Family) -> np.ndarray:
    """Held-out log-likelihoods [N, settings, spreads] corrected for the leak of margins cross-fitted on these labels.

    A cross-fitted margin has not seen its own pair's label, but the other pairs' margins have: a policy that learns
    from them has seen every label, those of its test fold included. sigmoid(b m) by itself has not. The excess of soft
    labels over it estimates the leak, which biases a loss by the weight of its margin, t + (1 - t) g.
    """
    soft = heldout.loglik[:, family.grid.index(SOFT)].mean(axis=0).max()
    leak = max(0.0, float(soft - heldout.margin_alone.mean()))
    weight = np.array([s.trust + (1 - s.trust) * s.strength for s in family.grid])
    return heldout.loglik - leak * weight[None, :, None]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """log sigmoid(x), numerically stable."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def _labels(margin: np.ndarray, slope: float, family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Target and weight [N, settings] of the loss ``trust``."""
    m = torch.from_numpy(np.ascontiguousarray(margin, dtype=np.float64))
    shape = {name: getattr(family.madpo, name) for name in ("c_max", "c_min", "lam", "tau")}
    columns = [
        trusted_label(m, slope=slope, trust=setting.trust, strength=setting.strength, **shape)
        for setting in family.grid
    ]
    target, weight = (torch.stack(values, dim=1).numpy() for values in zip(*columns, strict=True))
    return target, weight
