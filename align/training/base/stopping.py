"""Ctrl-C and SIGTERM during training: finish the step, write a checkpoint, leave; all processes at the same step."""

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
ONE_NOTICE_SECONDS = 2.0
"""A process under a launcher may get one notice twice: from the scheduler, and from the launcher that had it too."""


class StopAfterStep(TrainerCallback):
    """Ends the training with a checkpoint at the next step once a process has had a signal.

    Args:
        accelerator: of the trainer. Several processes ask each other after each step, since a signal reaches them
            within different steps, or one of them only.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.heard: int | None = None
        """Number of the signal that this process had."""
        self.agreed: int | None = None
        """That for which all processes stop after this step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and to stop."""
        self.agreed = self.heard
        if self.accelerator.num_processes > 1:
            own = torch.tensor([self.heard or 0], device=self.accelerator.device)
            self.agreed = int(self.accelerator.gather(own).max()) or None
        if self.agreed is not None:
            control.should_save = True
            control.should_training_stop = True

    def check(self) -> None:
        """Leave, after a training that was stopped.

        Raises:
            SystemExit: 128 + the number of the signal.
        """
        if self.agreed is not None:
            raise SystemExit(128 + self.agreed)


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[StopAfterStep]:
    """While inside, the first Ctrl-C or SIGTERM lets ``trainer`` finish its step and save; the second acts at once.

    What comes within ``ONE_NOTICE_SECONDS`` of the first counts as the same. Call ``check`` once the training is over;
    a signal after its last step lets what follows inside end, such as saving the model. A launcher passes its own
    signal on to its processes and gives them half a minute, torch's default, before it kills them.

    Raises:
        SystemExit: 128 + the number of the signal.
    """
    callback = StopAfterStep(trainer.accelerator)
    trainer.add_callback(callback)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if callback.heard is None:
            callback.heard, first = number, time.monotonic()
            log.warning("stopping after this step, with a checkpoint; a second signal stops at once")
        elif time.monotonic() - first >= ONE_NOTICE_SECONDS:
            for each, handler in before.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if callback.heard is not None:
        raise SystemExit(128 + callback.heard)
