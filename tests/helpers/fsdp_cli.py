"""`align` under FSDP2 on CPUs with gloo, for tests only.

accelerate shards only on accelerators; on CPUs it ignores an FSDP configuration. Here it takes the processes for
several GPUs whose device is the CPU. Sharding, gathering and saving are torch's FSDP2 as accelerate sets it up; only
transport and device differ from a run on GPUs.

After each step every process writes to ``sharded-<rank>.json`` how many trained parameters are sharded, and how many
there are.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

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


def look(guard: FiniteSteps, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
    """Do what the guard does, then count the sharded parameters."""
    before(guard, args, state, control, model=model, **kwargs)
    trained = [p for p in model.parameters() if p.requires_grad]
    split = sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in trained)
    Path(f"sharded-{process_rank()}.json").write_text(json.dumps([split, len(trained)]))


FiniteSteps.on_optimizer_step = look  # type: ignore[method-assign]
PartialState._prepare_backend = backend
PartialState.set_device = device

if __name__ == "__main__":
    main()
