"""Ctrl-C and SIGTERM during training: finish the step, write a checkpoint, leave; all processes at the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.console import log

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAfterStep(TrainerCallback):
    """Ends the training with a checkpoint at the next step once a process has had a signal.

    Args:
        accelerator: of the trainer. Several processes ask each other after each step, since a signal reaches them
            within different steps, or one of them only.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal_number: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and to stop."""
        if self.accelerator.num_processes > 1:
            own = torch.tensor([self.signal_number or 0], device=self.accelerator.device)
            self.signal_number = int(self.accelerator.gather(own).max()) or None
        if self.signal_number is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """While inside, the first Ctrl-C or SIGTERM lets ``trainer`` finish its step and save; the second acts at once.

    A launcher passes its own signal on to its processes and gives them half a minute, torch's default, before it kills
    them.

    Raises:
        SystemExit: 128 + the number of the signal, after the checkpoint was written.
    """
    callback = StopAfterStep(trainer.accelerator)
    trainer.add_callback(callback)
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        callback.signal_number = number
        for each, handler in before.items():
            signal.signal(each, handler)
        log.warning("stopping after this step, with a checkpoint; a second signal stops at once")

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if callback.signal_number is not None and trainer.state.global_step < trainer.state.max_steps:
        raise SystemExit(128 + callback.signal_number)
