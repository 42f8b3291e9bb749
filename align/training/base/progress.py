"""Progress of a trl trainer: its own bar on a terminal, otherwise one plain line every 30 s."""

import time
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align.io.console import PLAIN_EVERY_SECONDS, err, log

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "accuracy")


class PlainProgress(TrainerCallback):
    """Logs finished steps, steps per second, remaining time and the last logged metrics."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.start = self.last = 0.0
        self.first_step = 0
        self.latest: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.start = self.last = time.monotonic()
        self.first_step = state.global_step
        log.info("%s: %d steps", self.what, state.max_steps - state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Keep the metrics in ``SHOWN``."""
        self.latest = {name: logs[name] for name in SHOWN if name in logs} or self.latest

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log a line if ``PLAIN_EVERY_SECONDS`` have passed since the last one."""
        now = time.monotonic()
        if now - self.last < PLAIN_EVERY_SECONDS:
            return
        self.last = now
        rate = (state.global_step - self.first_step) / (now - self.start)
        numbers = ", ".join(f"{name} {float(value):.3g}" for name, value in self.latest.items())
        left = (state.max_steps - state.global_step) / rate
        log.info("%s: step %d of %d, %.2g steps/s, %.0f s left; %s",
                 self.what, state.global_step, state.max_steps, rate, left, numbers)  # fmt: skip


def show_progress(trainer: Trainer, what: str) -> None:
    """Replace the trainer's printed metrics by this program's progress; ``what`` names the training."""
    trainer.remove_callback(PrinterCallback)
    if not err.is_terminal:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PlainProgress(what))
