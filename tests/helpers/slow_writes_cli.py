"""tests.helpers.dying_fsdp_cli with a slow or full disk.

The file disk.json in the working directory sets the ``seconds`` that writing a part takes from the checkpoint ``slow``
on, and the ``rank`` whose disk is full from the checkpoint ``full`` on. For each part that it writes, a process appends
the step of the checkpoint and the step that the training was in to writes.jsonl.
"""

import json
import time
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import TrainerState

from align.distributed import process_rank
from align.training.base.finite_guard import FiniteSteps
from tests.helpers.dying_fsdp_cli import main

WRITES, DISK = Path("writes.jsonl"), Path("disk.json")
write_data, step_begins = FileSystemWriter.write_data, FiniteSteps.on_step_begin
now = {"step": 0}


def begin(guard: FiniteSteps, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
    """Remember the current step."""
    now["step"] = state.global_step + 1
    step_begins(guard, args, state, *rest, **kwargs)


def slow_write(writer: FileSystemWriter, *args: Any, **kwargs: Any) -> Any:
    """Wait and write, or fail as on a full disk."""
    step, disk = int(Path(writer.path).parent.name.removeprefix("checkpoint-")), json.loads(DISK.read_text())
    if step >= disk.get("full", step + 1) and process_rank() == disk["rank"]:
        raise OSError(28, "No space left on device", str(writer.path))
    if step >= disk["slow"]:
        time.sleep(disk["seconds"])
    found = write_data(writer, *args, **kwargs)
    with WRITES.open("a") as stream:
        stream.write(json.dumps({"rank": process_rank(), "checkpoint": step, "written_in": now["step"]}) + "\n")
    return found


FileSystemWriter.write_data = slow_write  # type: ignore[method-assign]
FiniteSteps.on_step_begin = begin  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
