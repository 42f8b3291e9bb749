"""The work of each stage of a run. A stage reads the folders of earlier stages and writes one folder."""

from collections.abc import Callable
from pathlib import Path

from align.config import RunConfig
from align.run.plan import HELD_OUT
from align.run.stages.evaluation import stage_evaluate, stage_generate
from align.run.stages.policy import (
    stage_filter,
    stage_held_out,
    stage_margins,
    stage_pairs,
    stage_reward_pairs,
    stage_sample,
    stage_train,
    stage_trust,
)
from align.run.stages.reward import stage_crossfit, stage_reward

Work = Callable[[RunConfig, Path], None]
"""Reads the folders of earlier stages below ``config.folder`` and writes into the folder that it is given."""
WORK: dict[str, Work] = {
    "pairs": stage_pairs,
    "pairs-reward": stage_reward_pairs,
    "reward": stage_reward,
    "crossfit": stage_crossfit,
    "sample": stage_sample,
    "margins": stage_margins,
    HELD_OUT: stage_held_out,
    "filter": stage_filter,
    "trust": stage_trust,
    "evaluate": stage_evaluate,
}
WORK_OF_POLICY: dict[str, Callable[[RunConfig, Path, str], None]] = {"train": stage_train, "generate": stage_generate}
"""Stages that a run has once for each policy, ``train-<method>`` and ``generate-<policy>``."""


def work_of(stage: str) -> Work:
    """The work of the stage with this name."""
    kind, _, policy = stage.partition("-")
    if kind not in WORK_OF_POLICY:
        return WORK[stage]
    work = WORK_OF_POLICY[kind]
    return lambda config, folder: work(config, folder, policy)
