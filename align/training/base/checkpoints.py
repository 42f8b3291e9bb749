"""Checkpoints of a training that may have died at any moment, while it wrote one included."""

import json
import shutil
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from align.io.console import log

STATE = "trainer_state.json"
MODEL_PARTS, OPTIMIZER_PARTS = f"{FSDP_MODEL_NAME}_0", f"{OPTIMIZER_NAME}_0"
"""Folders of a checkpoint that the processes of a sharded training (FSDP2) write, each its part; accelerate's names."""
PARTS_WRITTEN = ".metadata"
"""What torch.distributed.checkpoint leaves last in such a folder."""
# before 5.18 transformers loads the optimizer of several CPU processes to "cpu:0", a name that torch does not know
torch.serialization.register_package(100, lambda _: None, lambda one, at: one if at.startswith("cpu:") else None)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint under ``folder`` that was written to its end; newer, unfinished ones are removed.

    The trainer writes the state last, so a checkpoint whose state can be read is whole, but for parts that are written
    in the background (``align/training/base/async_checkpoints.py``), which say so themselves.

    Args:
        folder: ``output_dir`` of the trainer; it need not exist.
    """
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True):
        if _is_whole(checkpoint):
            return str(checkpoint)
        log.warning("%s: not written to its end, left out", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    parts = [checkpoint / name for name in (MODEL_PARTS, OPTIMIZER_PARTS)]
    written = all((folder / PARTS_WRITTEN).exists() for folder in parts if folder.is_dir())
    return written and f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" == checkpoint.name
