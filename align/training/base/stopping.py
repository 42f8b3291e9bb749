"""Ctrl-C and SIGTERM during training: finish the step, save a checkpoint, exit; all processes at the same step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.io.console import log

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL_SECONDS = 2.0
"""A process under a launcher may receive one signal twice: from the scheduler and, passed on, from the launcher."""


class StopAfterStep(TrainerCallback):
    """Ends the training with a checkpoint after the current step once a process has received a signal.

    Args:
        accelerator: the trainer's. Several processes gather their signals after each step, since a signal may reach
            them in different steps, or only one of them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received: int | None = None
        """Number of the signal that this process received."""
        self.agreed: int | None = None
        """Number of the signal for which all processes stop after this step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a save and the end of the training."""
        self.agreed = self.received
        if self.accelerator.num_processes > 1:
            local = torch.tensor([self.received or 0], device=self.accelerator.device)
            self.agreed = int(self.accelerator.gather(local).max()) or None
        if self.agreed is not None:
            control.should_save = True
            control.should_training_stop = True

    def check(self) -> None:
        """Exit if the training was stopped.

        Raises:
            SystemExit: 128 + the number of the signal.
        """
        if self.agreed is not None:
            raise SystemExit(128 + self.agreed)


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[StopAfterStep]:
    """Within the block, the first Ctrl-C or SIGTERM lets ``trainer`` finish its step and save; the second acts at once.

    A signal within ``SAME_SIGNAL_SECONDS`` of the first counts as the same. Call ``check`` after the training; a signal
    after its last step lets the rest of the block finish, such as saving the model. A launcher passes its own signal on
    to its processes and gives them half a minute, torch's default, before it kills them.

    Raises:
        SystemExit: 128 + the number of the signal.
    """
    callback = StopAfterStep(trainer.accelerator)
    trainer.add_callback(callback)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if callback.received is None:
            callback.received, first = number, time.monotonic()
            log.warning("stopping after this step, with a checkpoint; a second signal stops at once")
        elif time.monotonic() - first >= SAME_SIGNAL_SECONDS:
            for other, handler in before.items():
                signal.signal(other, handler)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if callback.received is not None:
        raise SystemExit(128 + callback.received)
