"""The stages of a run: name to function."""

from collections.abc import Callable
from pathlib import Path

from align.config import RunConfig
from align.run.stages.evaluation import stage_evaluate, stage_generate
from align.run.stages.policy import stage_filter, stage_margins, stage_pairs, stage_sample, stage_train, stage_trust
from align.run.stages.reward import stage_crossfit, stage_reward

WORK: dict[str, Callable[[RunConfig, Path, Path, str], None]] = {
    "pairs": stage_pairs,
    "reward": stage_reward,
    "crossfit": stage_crossfit,
    "sample": stage_sample,
    "margins": stage_margins,
    "filter": stage_filter,
    "trust": stage_trust,
    "train": stage_train,
    "generate": stage_generate,
    "evaluate": stage_evaluate,
}
