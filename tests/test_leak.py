"""Memory stays flat over a long training."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from align.config import LossConfig, TrainConfig
from align.loss_registry import resolve
from align.training.train import make_trainer
from tests.builders import rows

STEPS, WARM_UP, EVERY = 2000, 500, 50
ALLOWED = 12e6
"""Bytes of growth over the last 1,500 steps: 8 kB a step, less than the token ids of one batch kept alive."""


class Memory(TrainerCallback):
    """Resident bytes of this process every ``EVERY`` steps."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read it."""
        if state.global_step % EVERY == 0:
            self.seen[state.global_step] = psutil.Process().memory_info().rss


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["madpo", "beta_dpo"])
def test_memory_is_flat_over_two_thousand_steps(tiny_policy: Path, tmp_path: Path, loss: str) -> None:
    small = {"max_steps": STEPS, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False,
             "logging_steps": 500}  # fmt: skip
    config = TrainConfig(model=str(tiny_policy), methods={loss: LossConfig(loss=loss)}, trainer=small)
    bound = resolve(loss, {})
    trainer = make_trainer(Dataset.from_list(rows(12)), config, bound, tmp_path, seed=0, tau=1.0, reference_cache=None)
    memory = Memory()
    trainer.add_callback(memory)
    trainer.train()
    warm = max(found for step, found in memory.seen.items() if step <= WARM_UP)
    assert memory.seen[STEPS] - warm < ALLOWED, memory.seen
