"""The numbers and the sentences of a report, from a table of measured pairs."""

from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import spearmanr

from align.entanglement.conditions import FALLS, shares
from align.stats import share_interval

SCREENS = ("ches", "ches_normalised", "hidden_cosine", "token_difference")
AGAINST = (*SCREENS, "tokens_chosen", "tokens_rejected", "margin", "logp_chosen_change")
RARE = 0.02
"""Largest share of entangled pairs that needs no remedy."""


def summarize(table: Dataset, *, seed: int = 0) -> dict[str, Any]:
    """Compute shares of verdicts with 95% intervals, quartiles, and rank correlations of the cosine.

    Args:
        table: rows of ``measure_entanglement``.
        seed: seed of the bootstrap.
    """
    verdicts = list(table["verdict"])
    columns = {name: np.asarray(table[name], dtype=np.float64) for name in ("cosine", "norm_ratio", "d_w", "d_l")}
    falling = [verdict in FALLS for verdict in verdicts]
    return {
        "pairs": len(verdicts),
        "shares": shares(verdicts),
        "entangled": share_interval(np.asarray(table["entangled"], dtype=float)).to_dict(),
        "chosen_falls": share_interval(np.asarray(falling, dtype=float)).to_dict(),
        "cosine": _quartiles(columns["cosine"]),
        "norm_ratio": _quartiles(columns["norm_ratio"]),
        "weight_ratio": _quartiles(columns["d_w"][columns["d_l"] != 0] / columns["d_l"][columns["d_l"] != 0]),
        "cosine_against": {
            name: rank_correlation(columns["cosine"], np.asarray(table[name], dtype=np.float64))
            for name in AGAINST
            if name in table.column_names
        },
    }


def advice(summary: dict[str, Any], loss: str) -> dict[str, str]:
    """Sentences on a summary: ``headline`` says what it shows, ``next_step`` what to do about it."""
    falls, entangled = summary["chosen_falls"], summary["entangled"]
    percent = share_text(falls, digits=0)
    ratio = summary["norm_ratio"]["median"]
    if entangled["value"] <= RARE:
        most = 1.0 if entangled["high"] is None else entangled["high"]
        if most > RARE:
            return {
                "headline": f"Few entangled pairs were seen under a step of {loss}; {entangled['n']} pairs show only "
                f"that at most {most:.0%} are entangled.",
                "next_step": "Measure more pairs (--limit) before relying on this, and again late in training.",
            }
        return {
            "headline": f"A step of {loss} separates the responses of nearly every pair.",
            "next_step": "No remedy is needed here. Measure again late in training: entanglement grows as rejected "
            "responses become unlikely.",
        }
    if falls["value"] > RARE:
        return {
            "headline": f"A step of {loss} on a pair alone would lower the chosen response in {percent} of the pairs: "
            f"the norm of the rejected gradient is {ratio:.2g} times that of the chosen one (median).",
            "next_step": "Compare rewards on held-out prompts first: the model can improve while the chosen responses "
            "fall, and losses that hold them up gained less in our study (docs/entanglement.md). If their likelihood "
            "itself matters: `remedy: {kind: hold_batch}`, `loss: dpop`, or fewer epochs.",
        }
    return {
        "headline": f"A step of {loss} on a pair alone would raise both responses in "
        f"{100 * summary['shares']['both rise']:.0f}% of the pairs; the chosen response falls in {percent}.",
        "next_step": "Rising rejected responses are rarely a problem while the margin grows: watch logps/rejected.",
    }


def share_text(share: dict[str, Any], *, digits: int = 1) -> str:
    """``12.5% (3.5 to 36.0%)``: a share with its 95% interval, if the pairs give one."""
    if share["low"] is None:
        return f"{100 * share['value']:.{digits}f}% (of {share['n']})"
    low, high = (100 * share[end] for end in ("low", "high"))
    return f"{100 * share['value']:.{digits}f}% ({low:.{digits}f} to {high:.{digits}f}%)"


def _quartiles(values: np.ndarray) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"low": 0.0, "median": 0.0, "high": 0.0}
    low, median, high = np.quantile(finite, [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(median), "high": float(high)}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of the finite pairs of values; None for fewer than four, or a constant."""
    keep = np.isfinite(a) & np.isfinite(b)
    if keep.sum() < 4 or np.ptp(a[keep]) == 0 or np.ptp(b[keep]) == 0:
        return None
    return float(spearmanr(a[keep], b[keep]).statistic)
