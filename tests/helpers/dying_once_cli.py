"""`align` that writes down the pairs of each optimizer step, and of which one process dies once if it is told to.

Each process appends a line for each step to steps.jsonl in the working directory. Where that has a file dies.json, the
process of its ``rank`` takes the file away in the middle of its ``step`` and dies as if killed, and where ``agent`` is
true its launcher with it, as a machine would.
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
    """Do what the guard does; then end, if it is time."""
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
