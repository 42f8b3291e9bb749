"""What a run has measured about each model it trained, in that model's card and in its tracked run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from align.config import RunConfig
from align.models.model_card import add_results
from align.stats import interval
from align.training.base.arguments import build_trainer_args
from align.training.base.tracked_runs import log_figures, tracked_run
from align.training.train import MODEL

POLICY_FIGURES = {
    "reward": "reward by the judge",
    "gain": "gain over the model it was trained from",
    "kl": "KL to the model it was trained from, nats per response",
    "gain_per_root_kl": "gain / sqrt(2 KL)",
    "reward_model_gain": "gain by the run's own reward model, which training has optimized",
}
REWARD_FIGURES = {"accuracy": "accuracy on held-out pairs"}
OWN_FIGURES = {"out_of_fold_accuracy": "accuracy of cross-fitted models on pairs that each has not seen"}


def publish_figures(config: RunConfig, report: Mapping[str, Any]) -> None:
    """Add the report's figures to the cards and the tracked runs of the policies and of the reward model.

    Args:
        config: the run.
        report: its report, see ``collect``.
    """
    evaluation = report.get("evaluation", {})
    policies, judge = evaluation.get("policies", {}), evaluation.get("judge")
    for method in report.get("training", {}).get("methods", {}):
        found = {name: policies.get(method, {}).get(name) for name in POLICY_FIGURES}
        note = f"95% intervals over {evaluation.get('n_prompts')} held-out prompts; judge: {judge}."
        add_results(config.folder / f"train-{method}" / MODEL, _rows(found, POLICY_FIGURES), note)
        if config.train is not None:
            _log(config, method, config.train.trainer, found)
    model = report.get("reward_model")
    if model is not None and config.reward is not None:
        found = {"accuracy": model["heldout"]["accuracy"]}
        if "out_of_fold" in model:
            found["out_of_fold_accuracy"] = model["out_of_fold"]["accuracy"]
        rows = _rows(found, REWARD_FIGURES | OWN_FIGURES)
        add_results(
            config.folder / "reward" / MODEL, rows, "95% intervals; pairs of one prompt are resampled together."
        )
        _log(config, "reward", config.reward.trainer, found)


def _rows(found: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of the table of a card: what was measured, and its value with the interval."""
    return [(names[name], interval(estimate)) for name, estimate in found.items() if estimate is not None]


def _log(config: RunConfig, part: str, fields: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Log each figure and both ends of its interval."""
    run = tracked_run(config.folder, config.name, part)
    figures: dict[str, float] = {}
    for name, estimate in found.items():
        if estimate is not None:
            ends = (("", "value"), ("_low", "low"), ("_high", "high"))
            figures |= {f"{name}{end}": float(estimate[key]) for end, key in ends if estimate[key] is not None}
    log_figures(run, lambda: _arguments(fields, run.folder), figures)


def _arguments(fields: Mapping[str, Any], folder: Path) -> TrainingArguments:
    """The fields of ``trainer`` that name projects and places of trackers."""
    known = {name: value for name, value in fields.items() if name in TrainingArguments.__dataclass_fields__}
    names = ("project", "trackio_space_id", "hub_private_repo", "report_to")
    shown = {name: known[name] for name in names if name in known}
    return build_trainer_args(TrainingArguments, shown, path="trainer", forced={"output_dir": str(folder)})
