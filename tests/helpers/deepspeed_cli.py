"""`align` under DeepSpeed on CPUs with gloo, for tests only.

accelerate uses DeepSpeed only on accelerators. Here it takes the processes for several GPUs whose device is the CPU;
DeepSpeed's kernel for shared memory, which it would compile first, is left out. Dividing, reducing and stepping are
DeepSpeed's own. Parameters of any
size are divided under ZeRO 3, which keeps small ones whole by default. Each process writes the kind of its optimizer,
and whether every parameter is divided, to ``divided-<rank>.txt``. If there is a file ``die-at.txt`` all processes die
in the step that it names, once.
"""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (its modules are changed below)
import torch
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from align.cli.main import main
from align.distributed import process_rank
from align.training.base.finite_guard import FiniteSteps


def backend(state: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    """gloo, labeled as several GPUs."""
    return "gloo", DistributedType.MULTI_GPU


def device(state: PartialState) -> None:
    """Set the CPU as the device."""
    state.device = torch.device("cpu")


configure = DeepSpeedPlugin.__post_init__


def without_threshold(plugin: DeepSpeedPlugin) -> None:
    """Divide small parameters too."""
    configure(plugin)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


before = FiniteSteps.on_optimizer_step


def look(guard: FiniteSteps, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Do what the guard does, then write down whose optimizer stepped."""
    before(guard, args, state, control, **kwargs)
    divided = all(parameter.numel() == 0 for parameter in kwargs["model"].parameters())
    Path(f"divided-{process_rank()}.txt").write_text(f"{type(kwargs['optimizer']).__name__} {divided}")
    die = Path("die-at.txt")
    if die.exists() and int(die.read_text()) == state.global_step:
        torch.distributed.barrier()
        if process_rank() == 0:
            die.unlink()
        torch.distributed.barrier()
        os._exit(9)


FiniteSteps.on_optimizer_step = look  # type: ignore[method-assign]
PartialState._prepare_backend = backend
PartialState.set_device = device
DeepSpeedPlugin.__post_init__ = without_threshold  # type: ignore[method-assign]
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

if __name__ == "__main__":
    main()
