"""`align` whose last process is killed in the middle of the optimizer step ``STEP``."""

import os
import signal
from typing import Any

from align.cli.main import main
from align.distributed import process_rank, world_size
from align.training.base.finite_guard import FiniteSteps

STEP = 8
before = FiniteSteps.on_step_begin


def die(guard: FiniteSteps, *args: Any, **kwargs: Any) -> None:
    """Do what the guard does, then die."""
    before(guard, *args, **kwargs)
    if guard.step == STEP and process_rank() == world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)


FiniteSteps.on_step_begin = die  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
