"""Findings about single pairs: length bias, distance to the training pairs, disagreements with the labels."""

from typing import Any

import numpy as np
from datasets import Dataset

from align.data.text import plain
from align.stats import correlation, disjoint, interval, share_among
from reward_models.length_bias import length_probe, word_difference

SHOWN = 15
SHOWN_CHARACTERS = 1200
REFERENCE = "teacher_margin"


def pair_findings(
    pairs: Dataset,
    margins: np.ndarray,
    *,
    distances: tuple[np.ndarray, float] | None,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Length bias, correlation with a reference, pairs far from the training pairs, largest disagreements.

    Args:
        pairs: the scored pairs, [N]; a ``teacher_margin`` column holds margins of another source,
            such as human ratings.
        margins: reward of chosen minus reward of rejected, [N].
        distances: distance [N] of each pair to the reward model's training pairs, and the limit that most held-out
            training pairs are within.
        seed: seed of the intervals.
        clusters: cluster of each pair, [N], for a bootstrap over clusters.

    Returns:
        JSON values: ``length``, ``reference_correlation`` and ``ood`` (None if not measured), ``disagreements``.
    """
    found: dict[str, Any] = {"length": length_probe(margins, word_difference(pairs), clusters=clusters)}
    found["reference_correlation"] = None
    if REFERENCE in pairs.column_names and None not in pairs[REFERENCE]:
        found["reference_correlation"] = correlation(
            margins, np.asarray(pairs[REFERENCE], dtype=np.float64), clusters=clusters
        )
    found["ood"] = None if distances is None else _far(pairs, margins, *distances, seed=seed, clusters=clusters)
    wrong = [int(k) for k in np.argsort(margins, kind="stable")[:SHOWN] if margins[k] < 0]
    found["disagreements"] = [_shown(pairs[k], margin=float(margins[k])) for k in wrong]
    return found


def finding_sentences(found: dict[str, Any]) -> list[str]:
    """Sentences about the findings that differ from chance."""
    sentences = []
    longer, shorter = found["length"]["accuracy_longer"], found["length"]["accuracy_shorter"]
    if longer and shorter and (disjoint(longer, shorter) or disjoint(shorter, longer)):
        kind = "longer" if disjoint(longer, shorter) else "shorter"
        sentences.append(
            f"It pays for {kind} responses: it agrees with {interval(longer)} of the labels that prefer the longer "
            f"response and with {interval(shorter)} of those that prefer the shorter one (`reward.length_residual`)."
        )
    ood = found["ood"]
    if ood is not None and ood["accuracy_far"] is not None and ood["accuracy_near"] is not None:
        sentences.append(
            f"{ood['share']:.1%} of the pairs are farther from its training pairs than 99% of those held back; there "
            f"it agrees with {interval(ood['accuracy_far'])} of the labels, elsewhere with "
            f"{interval(ood['accuracy_near'])}."
        )
    return sentences


def _far(
    pairs: Dataset,
    margins: np.ndarray,
    distance: np.ndarray,
    limit: float,
    *,
    seed: int,
    clusters: np.ndarray | None,
) -> dict[str, Any]:
    right, far = np.where(margins == 0, 0.5, margins > 0), distance > limit
    farthest = [int(k) for k in np.argsort(-distance, kind="stable")[:SHOWN] if far[k]]
    return {
        "limit": limit,
        "share": float(far.mean()),
        "accuracy_far": share_among(right, far, clusters=clusters),
        "accuracy_near": share_among(right, ~far, clusters=clusters),
        "distances": [round(float(value), 3) for value in distance],
        "farthest": [_shown(pairs[k], margin=float(margins[k]), distance=float(distance[k])) for k in farthest],
    }


def _shown(row: dict[str, Any], **numbers: float) -> dict[str, Any]:
    texts = {name: plain(row[name])[:SHOWN_CHARACTERS] for name in ("prompt", "chosen", "rejected")}
    return {"id": str(row["id"]), "group": row.get("group"), **texts, **numbers}
