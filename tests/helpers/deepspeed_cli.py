"""`align` under DeepSpeed on CPUs with gloo, for tests only.

accelerate uses DeepSpeed only on accelerators. Here it takes the processes for several GPUs whose device is the CPU;
DeepSpeed's kernel for shared memory, which it would compile first, is left out. Dividing, reducing and stepping are
DeepSpeed's own. Each process writes the kind of its optimizer to ``optimizer-<rank>.txt``.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (its modules are changed below)
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from align.cli.main import main
from align.distributed import process_rank
from align.training.base.finite_guard import FiniteSteps


def backend(state: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    """gloo, labeled as several GPUs."""
    return "gloo", DistributedType.MULTI_GPU


def device(state: PartialState) -> None:
    """Set the CPU as the device."""
    state.device = torch.device("cpu")


before = FiniteSteps.on_optimizer_step


def look(guard: FiniteSteps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Do what the guard does, then write down whose optimizer stepped."""
    before(guard, args, state, control, **kwargs)
    Path(f"optimizer-{process_rank()}.txt").write_text(type(kwargs["optimizer"]).__name__)


FiniteSteps.on_optimizer_step = look  # type: ignore[method-assign]
PartialState._prepare_backend = backend
PartialState.set_device = device
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

if __name__ == "__main__":
    main()
