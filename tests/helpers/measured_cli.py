"""`align` that records its resident memory every 50 optimizer steps, a JSON object per line of memory.jsonl."""

import gc
import json
from pathlib import Path
from typing import Any

from align.cli.main import main
from align.training.base.finite_guard import FiniteSteps

EVERY = 50
before = FiniteSteps.on_optimizer_step


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def measure(guard: FiniteSteps, *args: Any, **kwargs: Any) -> None:
    """Do what the guard does, then measure."""
    before(guard, *args, **kwargs)
    if guard.step % EVERY == 0:
        gc.collect()
        with Path("memory.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": guard.step, "mib": round(resident_mib(), 1)}) + "\n")


FiniteSteps.on_optimizer_step = measure  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
