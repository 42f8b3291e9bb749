"""Metrics of `align eval reward-model`: accuracy, calibration, and comparability across prompts and categories."""

from typing import Any

import numpy as np

from align.evaluation.ranking import auc_interval, opis
from align.evaluation.rewardbench import section_scores
from align.stats import disjoint, excludes, interval, share_among
from reward_models.margin_metrics import evaluate_margins

CHANCE = 0.5


def reward_model_metrics(
    chosen: np.ndarray,
    rejected: np.ndarray,
    groups: list[str] | None,
    *,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracy, calibration, global AUC, categories, OPIS, RewardBench's sections, and sentences about them. Pure.

    Args:
        chosen: rewards of the chosen responses, [N].
        rejected: rewards of the rejected responses, [N].
        groups: category of each pair, [N], or None.
        seed: seed of the intervals.
        clusters: cluster of each pair, [N], for a bootstrap over clusters; None: pairs are independent.
    """
    right = np.where(chosen == rejected, 0.5, chosen > rejected)
    found: dict[str, Any] = evaluate_margins(chosen - rejected, clusters=clusters).to_dict()
    found["auc"] = auc_interval(chosen, rejected, clusters=clusters).to_dict()
    found |= {"categories": {}, "macro_accuracy": None, "opis": None, "rewardbench": None}
    if groups is not None:
        names = np.asarray(groups)
        for name in sorted(set(groups)):
            found["categories"][name] = {
                "accuracy": share_among(right, names == name, clusters=clusters),
                "mean_reward": float(np.concatenate([chosen[names == name], rejected[names == name]]).mean()),
            }
        accuracies = {name: item["accuracy"]["value"] for name, item in found["categories"].items()}
        found["macro_accuracy"] = float(np.mean(list(accuracies.values())))
        found["rewardbench"] = section_scores(accuracies)
        if len(accuracies) > 1:
            found["opis"] = opis(chosen, rejected, groups, seed=seed, clusters=clusters).to_dict()
    return found | {"said": _sentences(found)}


def _sentences(found: dict[str, Any]) -> list[str]:
    """Sentences about the metrics, the most important first."""
    accuracy, area = found["accuracy"], found["auc"]
    if not excludes(accuracy, CHANCE):
        sentences = [
            f"At chance, as far as these pairs show: the reward model agrees with {interval(accuracy)} of them."
        ]
    else:
        sentences = [f"The reward model agrees with {interval(accuracy)} of the labels."]
    if disjoint(accuracy, area):
        sentences.append(
            f"Across pairs it orders worse than within them: global AUC {interval(area)}. The two rewards of a pair "
            "have something in common, an offset of the model or prompts whose responses are all better, which pairs "
            "do not tell apart; so compare responses to the same prompt, not rewards of different prompts."
        )
    if found["opis"] is not None:
        level = f"OPIS {found['opis']['value']:.4f}, by chance up to {found['opis']['chance_high']:.4f}"
        if found["opis"]["differs"]:
            parts = found["opis"]["categories"]
            worst = f"; furthest off: {max(parts, key=lambda name: parts[name])}" if len(parts) > 2 else ""
            sentences.append(
                f"One reward threshold does not mean the same in every category ({level}){worst}: the rewards there "
                "have another level, or separate the pairs less well or better."
            )
        else:
            sentences.append(f"No difference between the categories at a common reward threshold was seen ({level}).")
    return sentences
