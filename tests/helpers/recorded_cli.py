"""`align` that records, for each optimizer step, the ids of the pairs that this process contributed.

The file is ``used-<rank>.jsonl`` in the working directory, one list of ids per line.
"""

import json
from pathlib import Path
from typing import Any

from align.cli.main import main
from align.distributed import process_rank
from align.training.base.finite_guard import FiniteSteps

before = FiniteSteps.on_optimizer_step


def record(guard: FiniteSteps, *args: Any, **kwargs: Any) -> None:
    """Append the step's line, then do what the guard does."""
    with Path(f"used-{process_rank()}.jsonl").open("a") as stream:
        stream.write(json.dumps(guard.pairs) + "\n")
    before(guard, *args, **kwargs)


FiniteSteps.on_optimizer_step = record  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
