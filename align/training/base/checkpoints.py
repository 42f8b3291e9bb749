"""Checkpoints of a training that may have been killed at any moment, even while writing one."""

import json
import shutil
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align.errors import ConfigError
from align.io.console import log

STATE = "trainer_state.json"
MODEL_SHARDS, OPTIMIZER_SHARDS = f"{FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0"
"""Folders of a sharded checkpoint (FSDP2), in which each process writes its shard; accelerate's names."""
METADATA = ".metadata"
"""File that torch.distributed.checkpoint writes last into such a folder."""
OPTIMIZER_STATES = ("*optimizer*", "global_step*")
"""Files and folders that hold the state of an optimizer; the last is DeepSpeed's."""
# before 5.18 transformers loads the optimizer of several CPU processes to "cpu:0", a name that torch does not know
torch.serialization.register_package(100, lambda _: None, lambda one, at: one if at.startswith("cpu:") else None)


def last_complete_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint under ``folder``; newer, incomplete ones are removed.

    The trainer writes its state last, so a checkpoint with a readable state is complete, apart from shards that are
    written in the background (``align/training/base/async_checkpoints.py``), which have a metadata file each.

    Args:
        folder: ``output_dir`` of the trainer; it need not exist.
    """
    for checkpoint in _newest_first(folder):
        if _is_complete(checkpoint):
            return str(checkpoint)
        log.warning("%s: not written to its end, removed", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint under ``folder``; removes nothing, so a training may go on meanwhile."""
    return next((checkpoint for checkpoint in _newest_first(folder) if _is_complete(checkpoint)), None)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def check_resumable(checkpoint: Path) -> None:
    """Refuse a checkpoint that holds the model alone: its optimizer would start again without a word.

    Raises:
        ConfigError: there is no such folder, or no state of an optimizer in it.
    """
    if not checkpoint.is_dir():
        raise ConfigError(
            f"resume_from_checkpoint: found no folder {checkpoint}, expected a checkpoint of this training",
            code="checkpoint-optimizer",
            hint='name one that there is, or write "auto": the last complete one in output_dir, else the start',
        )
    if not any(next(checkpoint.glob(pattern), None) for pattern in OPTIMIZER_STATES):
        raise ConfigError(
            f"{checkpoint}: holds no optimizer (save_only_model), so a training cannot go on from it",
            code="checkpoint-optimizer",
            hint="train from the start, or give the checkpoint as the model of a new training",
        )


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    shards = [checkpoint / name for name in (MODEL_SHARDS, OPTIMIZER_SHARDS)]
    written = all((folder / METADATA).exists() for folder in shards if folder.is_dir())
    return written and f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" == checkpoint.name
