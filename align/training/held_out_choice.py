"""Which evaluated step becomes the trained model, why, and when a training stops."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from align.config import KeepSection
from align.errors import ConfigError
from align.io.console import log
from align.training.held_out import ALL, PARTS

UNDEFINED, OVER_LIMIT = 1e15, 1e18
"""Scores of steps whose value is not defined begin near the former, those of steps beyond the limit at the latter."""
EVAL = "eval_"
KINDS = ("pairs", "samples")
NAMES = {
    "held_out_loss": ("loss", "held-out loss", "lowest"),
    "win_rate": ("win_rate", "win rate against the start", "highest"),
    "gold_per_root_kl": ("gain_per_root_kl", "gain / sqrt(2 KL)", "highest"),
}
"""Rule -> its metric, the words for it, and which of two steps is better."""


def measured(record: Mapping[str, Any], rule: str, part: str) -> Mapping[str, Any]:
    """The metrics that a rule reads in the record of a step: of the pairs or of the samples; empty if not measured."""
    found = record.get("pairs" if rule == "held_out_loss" else "samples", {}).get(part, {})
    return {} if found is None else found


def keep_score(record: Mapping[str, Any], keep: KeepSection) -> float | None:
    """What orders steps under a rule, the smallest first; None if the step was not measured for it.

    First come the steps within the KL limit, by their value; among those whose value is not defined the last comes
    first. Steps beyond the limit follow, by their KL.
    """
    found = measured(record, keep.rule, PARTS[0])
    name = NAMES[keep.rule][0]
    if name not in found:
        return None
    kl = found.get("kl")
    if keep.kl_at_most is not None and kl is not None and kl["value"] > keep.kl_at_most:
        return float(OVER_LIMIT * (1 + kl["value"]))
    if found[name] is None:
        return UNDEFINED - float(record["step"])
    value = float(found[name]["value"])
    return value if keep.rule == "held_out_loss" else -value


def check_limit(pairs: Mapping[str, Mapping[str, Any]], keep: KeepSection) -> None:
    """Refuse a limit on a KL that was not measured on the pairs that choose: every step would be within it.

    Args:
        pairs: part -> metrics of the held-out pairs of a step.
        keep: the rule.

    Raises:
        ConfigError: see above.
    """
    if keep.rule == "held_out_loss" and keep.kl_at_most is not None and "kl" not in pairs.get(PARTS[0], {}):
        raise ConfigError(
            f"train.keep.kl_at_most: found {keep.kl_at_most:g}, and no KL is measured on the pairs that choose a step, "
            "because the reference's states for all of them take too much space",
            code="eval-config",
            hint="leave kl_at_most out, or hold out shorter pairs",
        )


def kept_step(records: Sequence[Mapping[str, Any]], keep: KeepSection, step: int | None, last: int) -> dict[str, Any]:
    """The record of a choice: the step, why, what chose it, and its numbers on the prompts that did not.

    Args:
        records: of all evaluated steps.
        keep: the rule.
        step: the step whose checkpoint was loaded; None: none was.
        last: last step of the training.
    """
    _, words, better = NAMES[keep.rule]
    scores = {one["step"]: score for one in records if (score := keep_score(one, keep)) is not None}
    trained = {at: score for at, score in scores.items() if at > 0}
    if step is None:
        why = f"no step after the start was measured for the rule {keep.rule}: the last one is kept"
        log.warning("keep: %s", why)
        return {"rule": keep.rule, "kl_at_most": keep.kl_at_most, "step": last, "last": last, "why": why}
    score, limit = scores[step], keep.kl_at_most
    within = "" if limit is None else f" with a KL of at most {limit:g} nats"
    count = sum(one < UNDEFINED / 2 for one in trained.values())
    why = f"the {better} {words} among {count} evaluated steps{within}"
    if score >= OVER_LIMIT:
        why = f"no step has a KL of at most {limit:g} nats: the one with the smallest is kept"
    elif score > UNDEFINED / 2:
        why = f"no step{within} has a defined {words}: the last of them is kept"
    elif 0 in scores and scores[0] <= score:
        why += ", though the start is not worse"
    if score > UNDEFINED / 2 or why.endswith("not worse"):
        log.warning("keep: step %d: %s", step, why)
    return {"rule": keep.rule, "kl_at_most": limit, "step": step, "last": last, "why": why} | _halves(records, step)


def _halves(records: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """What the choosing and the reporting half of the held-out prompts say about a step, from pairs and samples."""
    record = next(one for one in records if one["step"] == step)
    return {part: {kind: found[part] for kind in KINDS if part in (found := record.get(kind) or {})} for part in PARTS}


def best_step(
    records: Sequence[Mapping[str, Any]], metric: str, *, greater: bool, step: int | None, last: int
) -> dict[str, Any]:
    """The record of transformers' own choice (``load_best_model_at_end``), in the form of ``kept_step``."""
    name = metric.removeprefix(EVAL)
    if step is None:
        return {"rule": name, "step": last, "last": last, "why": "no evaluated step was saved: the last one is kept"}
    why = f"the {'highest' if greater else 'lowest'} {name} of the evaluated steps (load_best_model_at_end)"
    return {"rule": name, "step": step, "last": last, "why": why} | _halves(records, step)


def flat_metrics(record: Mapping[str, Any], keep: KeepSection | None) -> dict[str, float]:
    """The record of a step as transformers reads and logs it: name after ``eval_`` -> value.

    Where something is chosen these are the numbers of the half that chooses; those of the other half are under
    ``eval_reporting/``.
    """
    found: dict[str, float] = {}
    pairs, samples = record.get("pairs", {}), record.get("samples", {})
    for part, prefix in ((PARTS[0] if PARTS[0] in pairs else ALL, ""), (PARTS[1], "reporting/")):
        found |= {f"{EVAL}{prefix}{name}": value["value"] for name, value in pairs.get(part, {}).items()}
    for name, value in samples.get(ALL, {}).items():
        if value is not None:
            found[f"{EVAL}samples/{name}"] = value["value"]
    score = None if keep is None else keep_score(record, keep)
    return found if score is None else found | {f"{EVAL}keep": score}


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose count of evaluations without improvement survives a resume."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count again over the evaluations in the log of the checkpoint."""
        self.early_stopping_patience_counter = 0
        name, better = self._metric(args), np.greater if args.greater_is_better else np.less
        best: float | None = None
        for entry in state.log_history:
            if name in entry and entry["step"]:
                before = TrainerState(best_metric=best)
                self.check_metric_value(args, before, control, entry[name])
                best = entry[name] if best is None or better(entry[name], best) else best

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Count an evaluation that has the metric; not that of the start, with which nothing is compared."""
        if state.global_step and self._metric(args) in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                log.info("early stopping: %d evaluations in a row without improvement of %s (best: %.4g)",
                         self.early_stopping_patience_counter, self._metric(args), state.best_metric)  # fmt: skip

    def _metric(self, args: TrainingArguments) -> str:
        return EVAL + str(args.metric_for_best_model).removeprefix(EVAL)
