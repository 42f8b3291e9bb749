"""tests.helpers.dying_fsdp_cli on a slow or full disk: how long parts take to be written, and whether they can be.

A file disk.json in the working directory says so: ``seconds`` that each part takes from the checkpoint ``slow`` on,
and of which ``rank`` the disk is full from the checkpoint ``full`` on. Each process appends to writes.jsonl, for each
of its parts, the step of the checkpoint and the step that the training was in when it was written.
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
    """Remember the step."""
    now["step"] = state.global_step + 1
    step_begins(guard, args, state, *rest, **kwargs)


def write_as_told(writer: FileSystemWriter, *args: Any, **kwargs: Any) -> Any:
    """Wait, then write; or fail as on a full disk."""
    step, disk = int(Path(writer.path).parent.name.removeprefix("checkpoint-")), json.loads(DISK.read_text())
    if step >= disk.get("full", step + 1) and process_rank() == disk["rank"]:
        raise OSError(28, "No space left on device", str(writer.path))
    if step >= disk["slow"]:
        time.sleep(disk["seconds"])
    found = write_data(writer, *args, **kwargs)
    with WRITES.open("a") as stream:
        stream.write(json.dumps({"rank": process_rank(), "checkpoint": step, "written_in": now["step"]}) + "\n")
    return found


FileSystemWriter.write_data = write_as_told  # type: ignore[method-assign]
FiniteSteps.on_step_begin = begin  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
