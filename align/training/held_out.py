"""The held-out pairs of a training: their clusters, the halves that choose and report, and their metrics. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from align.data.splits import clusters_of, folds_of_clusters
from align.errors import DataError, NumericsError
from align.stats import mean_interval, share_interval

KL_FIELDS = ("kl_chosen", "kl_rejected")
"""Numbers of a pair that are measured of a part of the pairs, see ``HeldOutPass``."""
PARTS = ("choosing", "reporting")
"""Halves of the held-out prompts where an evaluation chooses a step: one decides, the other is what is reported."""
ALL = "all"
Values = Mapping[str, np.ndarray]
"""Numbers of N held-out pairs, each [N]; ``loss`` with the pair's weight, terms of a sum under ``loss/<term>``."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Pairs that a policy is evaluated on while it trains."""

    pairs: Dataset
    clusters: np.ndarray
    """Cluster of each pair, int64 [N]; see ``clusters_of``."""
    choosing: np.ndarray | None
    """Whether a pair is of the half that chooses, bool [N]; None if nothing is chosen."""

    @classmethod
    def of(cls, pairs: Dataset, *, seed: int, choose: bool) -> "HeldOut":
        """Held-out pairs, divided by prompt into two halves if an evaluation on them chooses a step.

        Raises:
            DataError: they cannot be divided, because all of them belong to one prompt.
        """
        clusters = clusters_of(pairs)
        if not choose:
            return cls(pairs, clusters, None)
        choosing = folds_of_clusters(clusters, len(PARTS), seed) == 0
        if choosing.all() or not choosing.any():
            raise DataError(
                f"train.eval_pairs: found {len(pairs)} pairs that share their prompts or responses, expected at least "
                "two prompts: one half of the prompts chooses the checkpoint, the other reports its numbers",
                code="data-too-few",
                hint="hold out pairs of more prompts, or leave out keep, early_stopping and load_best_model_at_end",
            )
        return cls(pairs, clusters, choosing)

    def parts(self) -> dict[str, np.ndarray]:
        """Name of a part -> whether each pair belongs to it, bool [N]; all pairs last."""
        everything = {ALL: np.ones(len(self.pairs), dtype=bool)}
        if self.choosing is None:
            return everything
        return {PARTS[0]: self.choosing, PARTS[1]: ~self.choosing} | everything


def check_values(values: Values, ids: Sequence[str]) -> None:
    """Refuse numbers of N pairs of which some are not finite: no mean and no choice of a step can follow from them.

    Args:
        values: numbers of N pairs; the KL is NaN where it is not measured.
        ids: their names, [N].

    Raises:
        NumericsError: names the first such pair.
    """
    finite = {name: np.isfinite(column) for name, column in values.items() if name not in KL_FIELDS}
    bad = np.flatnonzero(~np.logical_and.reduce(list(finite.values())))
    if bad.size:
        first = int(bad[0])
        shown = ", ".join(f"{name} {values[name][first]:.6g}" for name in finite)
        raise NumericsError(
            f"held-out pair {ids[first]}: found {shown}, expected finite numbers ({bad.size} of {len(ids)} such pairs)",
            code="non-finite",
            hint="look at the pair; a smaller learning_rate, or train.trainer.bf16",
        )


def pair_metrics(values: Values, clusters: np.ndarray, *, beta: float) -> dict[str, dict[str, Any]]:
    """Metrics of held-out pairs by their names in the log, each an estimate with a 95% interval over clusters.

    A pair whose implicit rewards are equal counts half for the accuracy, so that it begins at 0.5. ``kl`` is the exact
    KL(policy || reference) along the chosen and the rejected response, nats per response: how far the policy has moved
    on these texts, which it did not write itself.

    Args:
        values: numbers of N pairs.
        clusters: [N].
        beta: scale of the implicit rewards.
    """
    chosen, rejected = values["chosen"] - values["ref_chosen"], values["rejected"] - values["ref_rejected"]
    gap = chosen - rejected
    means = {
        "loss": values["loss"],
        "rewards/margins": beta * gap,
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "logps/chosen": values["chosen"],
        "logps/rejected": values["rejected"],
        "logps/chosen_change": chosen,
        "logps/rejected_change": rejected,
    } | {name: column for name, column in values.items() if name.startswith("loss/")}
    found = {name: mean_interval(column, clusters=clusters).to_dict() for name, column in means.items()}
    right = (np.sign(gap) + 1) / 2
    found["rewards/accuracies"] = share_interval(right, clusters=clusters).to_dict()
    measured = ~np.isnan(values["kl_chosen"])
    if measured.any():
        kl = (values["kl_chosen"] + values["kl_rejected"])[measured]
        tokens = (values["chosen_tokens"] + values["rejected_tokens"])[measured]
        of = clusters[measured]
        found["kl"] = mean_interval(kl / 2, clusters=of).to_dict()
        found["kl_per_token"] = mean_interval(kl / np.maximum(tokens, 1), clusters=of).to_dict()
    return found
