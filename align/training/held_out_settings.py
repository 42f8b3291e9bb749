"""Settings of the evaluation while a policy trains: their defaults, and what is refused before a model loads."""

from typing import Any

from transformers.trainer_utils import SaveStrategy

from align.config import TrainSection, nearest
from align.errors import ConfigError, listed
from align.losses.registry import BoundLoss
from align.training.preference_config import PreferenceConfig

EVALUATIONS = 0.1
"""Default of ``eval_steps``: a share of all steps."""
KEEP_METRIC = "keep"
"""Metric by which the rule of ``keep`` orders checkpoints, the smallest first."""
METRICS = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "logps/chosen_change", "logps/rejected_change", "kl", "kl_per_token",
)  # fmt: skip
"""Names of what is measured on held-out pairs; the log has them after ``eval_``."""
DIRECTED = ("loss", "rewards/accuracies", "rewards/margins")
"""Metrics for which transformers' default of ``greater_is_better`` is right."""
OF_CHOICE = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
BY_SAMPLES = ("win_rate", "gold_per_root_kl")
"""Rules of ``keep`` that read samples."""
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules of the learning rate that read the metric of every evaluation."""
NO_END = 10**9
"""Steps between checkpoints of a training that only saves what its rule may keep."""


def chooses(config: TrainSection) -> bool:
    """Whether held-out prompts decide which step becomes the trained model."""
    fields = config.trainer
    best = fields.get("load_best_model_at_end") is True or fields.get("save_strategy") == "best"
    return best or config.keep is not None or config.early_stopping is not None


def evaluation_fields(config: TrainSection) -> dict[str, Any]:
    """Defaults of the trainer's fields for a training that evaluates."""
    if config.eval_pairs is None:
        return {}
    fields: dict[str, Any] = {"eval_strategy": "steps"}
    if config.trainer.get("eval_strategy", "steps") == "steps":
        fields["eval_steps"] = EVALUATIONS
    return fields


def set_choice(args: PreferenceConfig, config: TrainSection) -> None:
    """Set the fields by which transformers loads the checkpoint that ``keep`` chooses, or knows when to stop.

    The start is always evaluated: there the log-probs of the reference are computed.
    """
    args.eval_on_start = config.eval_pairs is not None
    if config.early_stopping is not None and args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = "loss", False
    if config.keep is None:
        return
    args.load_best_model_at_end = True
    args.metric_for_best_model, args.greater_is_better = KEEP_METRIC, False
    if args.save_strategy == SaveStrategy.NO:
        args.save_strategy, args.save_steps, args.save_total_limit = SaveStrategy.STEPS, NO_END, 1


def check_evaluation(config: TrainSection, loss: BoundLoss) -> None:
    """Refuse settings of the evaluation that do not go together or have no effect.

    Args:
        config: section ``train``.
        loss: loss of the method.

    Raises:
        ConfigError: every problem at once.
    """
    problems = _missing(config) + (_wrong_fields(config, loss) if config.eval_pairs is not None else [])
    if problems:
        raise ConfigError(listed(problems), code="eval-config", hint="docs/training.md shows the keys together")


def _missing(config: TrainSection) -> list[str]:
    """What a key needs and the section lacks."""
    problems = []
    keep, samples = config.keep, config.eval_samples
    if keep is not None and keep.rule == "held_out_loss" and config.eval_pairs is None:
        problems.append("train.keep.rule: found held_out_loss and no train.eval_pairs, whose loss it is")
    if keep is not None and keep.rule in BY_SAMPLES and samples is None:
        problems.append(f"train.keep.rule: found {keep.rule} and no train.eval_samples, which are judged for it")
    needs_kl = keep is not None and (keep.rule == "gold_per_root_kl" or keep.kl_at_most is not None)
    by_samples = keep is not None and keep.rule in BY_SAMPLES
    if needs_kl and by_samples and samples is not None and (samples.top_p, samples.temperature) != (1, 1):
        problems.append(
            f"train.eval_samples: found temperature {samples.temperature:g} and top_p {samples.top_p:g}, expected 1 "
            "and 1: train.keep reads a KL of the samples, which is that of the policy itself"
        )
    if samples is not None and samples.prompts is None and config.eval_pairs is None:
        problems.append("train.eval_samples: found neither prompts nor train.eval_pairs, expected one of them")
    if config.early_stopping is not None and config.eval_pairs is None and not by_samples:
        problems.append("train.early_stopping: found it and no train.eval_pairs, whose loss or metric it watches")
    return problems


def _wrong_direction(fields: dict[str, Any]) -> list[str]:
    """The problem of a ``greater_is_better`` under which the worst step is the best one."""
    name = str(fields.get("metric_for_best_model") or DIRECTED[0]).removeprefix("eval_")
    given, right = fields.get("greater_is_better"), name != DIRECTED[0]
    if name not in DIRECTED or not isinstance(given, bool) or given == right:
        return []
    return [f"train.trainer.greater_is_better: found {given} for the metric {name}, expected {right} or nothing"]


def _wrong_fields(config: TrainSection, loss: BoundLoss) -> list[str]:
    fields, problems = config.trainer, []
    if fields.get("eval_strategy", "steps") in ("no", False):
        problems.append("train.trainer.eval_strategy: found no together with train.eval_pairs, expected steps or epoch")
    every = fields.get("eval_steps")
    if every is not None and fields.get("eval_strategy") == "epoch":
        problems.append(f"train.trainer.eval_steps: found {every} and eval_strategy epoch, which does not read it")
    if isinstance(every, int | float) and not every > 0:
        problems.append(f"train.trainer.eval_steps: found {every}, expected more than 0")
    if config.keep is not None:
        problems += [
            f"train.trainer.{name}: found it together with train.keep, which decides it" for name in OF_CHOICE
            if fields.get(name) not in (None, False)
        ]  # fmt: skip
        if config.keep.rule in BY_SAMPLES and fields.get("lr_scheduler_type") in BY_METRIC:
            problems.append(
                f"train.trainer.lr_scheduler_type: found {fields['lr_scheduler_type']} and keep.rule "
                f"{config.keep.rule}, whose metric evaluations without samples lack"
            )
        if fields.get("save_strategy") == "best":
            problems.append("train.trainer.save_strategy: found best together with train.keep, which saves by its rule")
        return problems
    problems += _wrong_direction(fields)
    if (metric := fields.get("metric_for_best_model")) is not None:
        known = [*METRICS, *(f"loss/{part.spec.name}" for part in loss.parts if len(loss.parts) > 1)]
        name = str(metric).removeprefix("eval_")
        if name not in known:
            problems.append(
                f"train.trainer.metric_for_best_model: found {metric!r}, which is not measured{nearest(name, known)}"
            )
        elif name not in DIRECTED and fields.get("greater_is_better") is None:
            problems.append(
                f"train.trainer.greater_is_better: found nothing for the metric {name}, expected true or false"
            )
    return problems
