"""The processes of one launcher (``accelerate launch``, ``torchrun``): who this one is, and what they tell each other.

Without a launcher there is one process, and everything here does nothing.
"""

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from align.errors import EnvironmentProblem

T = TypeVar("T")
POLL_SECONDS = 0.2
LOST = (
    "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
    "Application timeout caused pair closure",
)  # fmt: skip
"""What torch says, in a RuntimeError, when a process at the other end is gone."""


def process_rank() -> int:
    """Rank of this process under a launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes under a launcher; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> str:
    """One GPU per process where there are any."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def wait_until(ready: Callable[[], bool]) -> None:
    """Poll until ``ready``; a first process that fails makes the launcher end this one."""
    while not ready():
        time.sleep(POLL_SECONDS)


def from_main_process(find: Callable[[], T]) -> T:
    """What ``find`` gives in the first process, in every process; it is called in no other.

    All processes call this at the same point of the program.
    """
    if world_size() == 1:
        return find()
    from accelerate.utils import broadcast_object_list

    init_process_group()
    found: list[Any] = [find() if process_rank() == 0 else None]
    broadcast_object_list(found, from_process=0)
    first: T = found[0]
    return first


def rank_share(items: Sequence[T]) -> Sequence[T]:
    """Every ``world_size``-th item, from this process's rank on: the shares of all are the whole."""
    return items[process_rank() :: world_size()]


def all_gather_objects(own: list[T]) -> list[T]:
    """The lists of all processes, one after the other by rank, in every process."""
    if world_size() == 1:
        return own
    from accelerate.utils import gather_object

    init_process_group()
    return list(gather_object(own))


def shutdown() -> None:
    """Close the process group at the end of a run that went well; left open, its threads may abort the process."""
    if world_size() == 1:
        return
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lost_process(error: BaseException) -> EnvironmentProblem | None:
    """What to tell the user about ``error`` if it means that another process is gone, else None."""
    if world_size() == 1:
        return None
    import torch

    chain: BaseException | None = error
    while chain is not None:
        gone = isinstance(chain, torch.distributed.DistError)
        if gone or (isinstance(chain, RuntimeError) and any(word in str(chain) for word in LOST)):
            return EnvironmentProblem(
                f"process {process_rank()} of {world_size()}: another process of this run has ended",
                code="process-lost",
                hint="look for its own message above or below; then start the same command again, it goes on from the "
                "last checkpoint",
            )
        chain = chain.__cause__ or chain.__context__
    return None


def init_process_group(seconds: float | None = None) -> None:
    """Join the process group, where nothing has done so before.

    Args:
        seconds: how long the processes wait for each other on CPUs before they take one for lost; None: as long as
            torch does, half an hour.

    Raises:
        EnvironmentProblem: torchrun has started the processes again in a way in which gloo cannot find them.
    """
    import torch
    from accelerate import PartialState

    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "torchrun has started the processes again with the addresses of those before, where gloo looks for them "
            "in vain",
            code="restart-store",
            hint="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and use --rdzv-backend=c10d; or start the same command "
            "again, it goes on from the last checkpoint",
        )
    waits = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
    if PartialState(**waits).num_processes != world_size():  # made by a library that does not ask for processes on CPUs
        PartialState._reset_state()
        joined = PartialState(cpu=not torch.cuda.is_available(), **waits).num_processes
        if joined != world_size():
            raise RuntimeError(f"the launcher started {world_size()} processes and {joined} found each other")
