"""`align` that records the pairs of each optimizer step, and one process of which dies once on request.

Each process appends a line per step to steps.jsonl in the working directory. If there is a file dies.json, the process
with its ``rank`` deletes that file in the middle of its ``step`` and kills itself; if ``agent`` is true it kills its
launcher too, as the loss of a machine would.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

from align.cli.main import main
from align.distributed import process_rank, world_size
from align.training.base.finite_guard import FiniteSteps

STEPS, ORDER = Path("steps.jsonl"), Path("dies.json")
step_begins, step_ends = FiniteSteps.on_step_begin, FiniteSteps.on_optimizer_step


def die(guard: FiniteSteps, *args: Any, **kwargs: Any) -> None:
    """Do what the guard does, then die if dies.json names this step and rank."""
    step_begins(guard, *args, **kwargs)
    if not ORDER.exists():
        return
    order = json.loads(ORDER.read_text())
    if (order["step"], order["rank"]) == (guard.step, process_rank()):
        ORDER.unlink()
        if order.get("agent"):
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def record(guard: FiniteSteps, *args: Any, **kwargs: Any) -> None:
    """Append the step's line, then do what the guard does."""
    line = {"step": guard.step, "rank": process_rank(), "processes": world_size(), "pairs": guard.pairs}
    with STEPS.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    step_ends(guard, *args, **kwargs)


FiniteSteps.on_step_begin = die  # type: ignore[method-assign]
FiniteSteps.on_optimizer_step = record  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
