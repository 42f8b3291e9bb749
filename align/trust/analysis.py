"""Analysis of a pair table's labels and margins before training, as plain numbers: no text, no files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.stats import above, below, mean_interval, out_of_fold, share_interval
from align.trust.evidence import fit_evidence
from align.trust.linear_proxy import DPO, MADPO, SOFT, Family, Setting, fit, held_out, scaled, without_leak
from align.trust.selection import Selection, bootstrap, by_labels, choose, standard_error

CHANCE = float(np.log(2))
"""Nats per label under a uniform guess."""
REFERENCES = {"dpo": DPO, "madpo": MADPO, "soft_labels": SOFT}
PARTS = {0.25: 3, 0.5: 3, 1.0: 1}
"""Points of the learning curves: share of the clusters to train on -> random draws that are averaged."""


def analyze(
    features: np.ndarray,
    margin: np.ndarray,
    folds: Sequence[np.ndarray],
    family: Family,
    *,
    same_labels: bool,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure the information in labels and in margins, and choose the setting to train with.

    Args:
        features: differences of frozen features [N, D], chosen minus rejected.
        margin: m [N], some below 0, not all equal.
        folds: for each repeat the fold [N] of every pair.
        family: the settings to try.
        same_labels: whether the margins were cross-fitted on these labels.
        seed: seed of the bootstrap and of the learning curves.
        clusters: cluster [N] of every pair (``clusters_of``), that intervals are over; None: each pair is one.

    Returns:
        JSON values: ``pairs``, ``agreement``, ``slope``, ``proposed``, ``decided`` (whether the lead of the proposed
        setting is beyond its interval), ``chosen`` (the proposed setting if decided, else plain DPO), ``interval``,
        ``by_labels``, ``grid``, ``gains`` (nats a pair over chance), ``against`` (nats a pair of the proposed setting
        over each single loss), ``curve``, ``evidence``.
    """
    x = scaled(features)
    heldout = held_out(x, margin, folds, family)
    loglik = without_leak(heldout, family) if same_labels else heldout.loglik
    theta = fit(x, margin, heldout.slope, family)
    evidence = fit_evidence(x, margin)
    proposed = choose(heldout, theta, evidence.theta, x, family, same_labels=same_labels, clusters=clusters)
    gains = _gains(loglik, heldout.margin_alone, proposed, family, clusters)
    agreement = share_interval(np.where(margin == 0, 0.5, margin > 0), clusters=clusters).to_dict()
    decided = leads(family.grid[proposed.setting], heldout.slope, agreement, **gains)
    dpo = by_labels(loglik, np.array([setting == DPO for setting in family.grid]))
    chosen = proposed if decided else dpo
    return {
        "pairs": len(margin),
        "directions": x.shape[1],
        "agreement": agreement,
        "slope": heldout.slope,
        "decided": decided,
        "proposed": _describe(proposed, family),
        "chosen": _describe(chosen, family),
        "interval": bootstrap(loglik, family.grid, seed=seed, clusters=clusters),
        "by_labels": _describe(by_labels(loglik), family),
        "grid": _grid(loglik, family, clusters),
        **gains,
        "curve": learning_curve(x, margin, folds[0], family, family.grid[chosen.setting], seed=seed, clusters=clusters),
        "evidence": {
            "slope": evidence.slope,
            "shared_error": evidence.shared_error,
            "independent_error": evidence.independent_error,
            "flip_rate": evidence.flip_rate,
        },
    }


def leads(
    proposed: Setting,
    slope: float,
    agreement: dict[str, Any],
    *,
    gains: dict[str, dict[str, Any]],
    against: dict[str, dict[str, Any]],
) -> bool:
    """Whether the data decide for the proposed setting.

    A setting other than DPO must predict better than chance and better than DPO, each beyond its interval; DPO must
    predict better than chance and better than soft labels, or the margins contradict the labels beyond the interval.
    """
    if slope == 0:
        return below(agreement, 0.5)
    other = "soft_labels" if proposed == DPO else "dpo"
    return above(gains["both"], 0.0) and above(against[other], 0.0)


def _gains(
    loglik: np.ndarray, margin_alone: np.ndarray, proposed: Selection, family: Family, clusters: np.ndarray | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Nats a pair: ``gains`` over chance, and ``against``, those of the proposed setting over each single loss."""

    def interval(values: np.ndarray) -> dict[str, Any]:
        return out_of_fold(mean_interval(values, clusters=clusters)).to_dict()

    best = loglik[:, proposed.setting, proposed.spread]
    alone = {name: _column(loglik, family, setting) for name, setting in REFERENCES.items()}
    return {
        "gains": {
            "margin": interval(margin_alone + CHANCE),
            "labels": interval(alone["dpo"] + CHANCE),
            "both": interval(best + CHANCE),
        },
        "against": {name: interval(best - values) for name, values in alone.items()},
    }


def learning_curve(
    features: np.ndarray,
    margin: np.ndarray,
    fold: np.ndarray,
    family: Family,
    chosen: Setting,
    *,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> list[dict[str, float]]:
    """Gain over chance (nats a pair) of DPO and of the chosen setting, trained on a random part of the clusters."""
    grid = (DPO, chosen) if chosen != DPO else (DPO,)
    part = Family(grid, family.spreads, family.madpo)
    points = []
    for share, draws in PARTS.items():
        means = [
            held_out(features, margin, [fold], part, share=share, clusters=clusters, seed=seed + k).loglik.mean(axis=0)
            for k in range(draws)
        ]
        best = np.mean(means, axis=0).max(axis=1) + CHANCE
        points.append({"share": share, "labels": float(best[0]), "chosen": float(best[-1])})
    return points


def labels_worth(curve: list[dict[str, float]]) -> float | None:
    """Further labels per pair that labels alone would need to gain as much as the chosen setting.

    Extrapolates the fit  gain = limit - cost / share  to the labels' learning curve; None: no number is enough.
    """
    limit, cost = _limit_and_cost(curve, "labels")
    gain = limit - cost + curve[-1]["chosen"] - curve[-1]["labels"]
    if cost <= 0 or gain >= limit:
        return None
    return max(0.0, cost / (limit - gain) - 1)


def overtaken_at(curve: list[dict[str, float]]) -> float | None:
    """Multiple of the present pairs at which labels alone do as well as the chosen setting; None: they never do."""
    limit, cost = _limit_and_cost(curve, "labels")
    other_limit, other_cost = _limit_and_cost(curve, "chosen")
    if limit <= other_limit or cost <= other_cost:
        return None
    return (cost - other_cost) / (limit - other_limit)


def _limit_and_cost(curve: list[dict[str, float]], name: str) -> tuple[float, float]:
    inverse = [1 / point["share"] for point in curve]
    slope, limit = np.polyfit(inverse, [point[name] for point in curve], 1)
    return float(limit), -float(slope)


def _column(loglik: np.ndarray, family: Family, setting: Setting) -> np.ndarray:
    """Held-out log-likelihood [N] under a setting at its best spread."""
    allowed = np.array([one == setting for one in family.grid])
    choice = by_labels(loglik, allowed)
    values: np.ndarray = loglik[:, choice.setting, choice.spread]
    return values


def _grid(loglik: np.ndarray, family: Family, clusters: np.ndarray | None) -> list[dict[str, float]]:
    """Each setting at its best spread: held-out log-likelihood and standard error of its difference from the best."""
    at = loglik.mean(axis=0).argmax(axis=1)
    columns = np.stack([loglik[:, k, j] for k, j in enumerate(at)], axis=1)
    top = columns[:, columns.mean(axis=0).argmax()]
    error = standard_error(columns - top[:, None], clusters)
    return [
        {
            "trust": s.trust,
            "strength": s.strength,
            "loglik": float(value),
            "error": float(e),
            "spread": family.spreads[j],
        }
        for s, value, e, j in zip(family.grid, columns.mean(axis=0), error, at, strict=True)
    ]


def _describe(choice: Selection, family: Family) -> dict[str, float]:
    setting = family.grid[choice.setting]
    return {"trust": setting.trust, "strength": setting.strength, "spread": family.spreads[choice.spread]}
