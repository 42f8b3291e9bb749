"""`align` whose last process dies as if killed, in the middle of its third optimizer step."""

import os
import signal
from typing import Any

from align.cli import main
from align.finite import FiniteSteps
from align.processes import process_rank, world_size

before = FiniteSteps.on_step_begin


def die(guard: FiniteSteps, *args: Any, **kwargs: Any) -> None:
    """Do what the guard does; then end."""
    before(guard, *args, **kwargs)
    if guard.step == 3 and process_rank() == world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)


FiniteSteps.on_step_begin = die  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
