"""What a training logs, in a file that grows while it goes on: `align view` follows it between checkpoints."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LIVE = "live.jsonl"
"""File beside the checkpoints: one line per logged step, removed once the last step is done. A resumed training appends
its steps again: a line takes back every earlier one of its step or a later one."""


class LiveLog(TrainerCallback):
    """Appends ``step``, ``of``, ``at`` (seconds since 1970) and every logged number to a file.

    A disk that does not take a line loses that line; checkpoints say so in time.

    Args:
        file: where to.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append a line."""
        if not state.is_world_process_zero:
            return
        numbers = {name: value for name, value in (logs or {}).items() if _is_number(value)}
        line = {**numbers, "step": state.global_step, "of": state.max_steps, "at": time.time()}
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def remove(self) -> None:
        """Remove the file: the history of the training holds the same."""
        self.file.unlink(missing_ok=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
