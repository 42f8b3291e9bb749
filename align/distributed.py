"""Rank, world size and collectives of the processes of a launcher (``accelerate launch``, ``torchrun``).

Without a launcher there is one process of rank 0, and the collectives return what they are given.
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
"""Parts of the messages of torch's RuntimeErrors after another process has ended."""


def process_rank() -> int:
    """Rank of this process under a launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes under a launcher; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> str:
    """Device of this process: its own GPU, or ``cpu`` if there is none."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def wait_until(ready: Callable[[], bool]) -> None:
    """Poll until ``ready``. If rank 0 fails, the launcher ends this process."""
    while not ready():
        time.sleep(POLL_SECONDS)


def from_main_process(find: Callable[[], T]) -> T:
    """Call ``find`` on rank 0 only and broadcast its result to all ranks; all of them have to call this."""
    if world_size() == 1:
        return find()
    from accelerate.utils import broadcast_object_list

    init_process_group()
    found: list[Any] = [find() if process_rank() == 0 else None]
    broadcast_object_list(found, from_process=0)
    first: T = found[0]
    return first


def rank_share(items: Sequence[T]) -> Sequence[T]:
    """Items of this rank: rank r gets items r, r + world_size, r + 2 world_size, ..."""
    return items[process_rank() :: world_size()]


def all_gather_objects(own: list[T]) -> list[T]:
    """Concatenation of the lists of all ranks, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return own
    from accelerate.utils import gather_object

    init_process_group()
    return list(gather_object(own))


def shutdown() -> None:
    """Destroy the process group after a successful run; its threads may otherwise abort the process."""
    if world_size() == 1:
        return
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lost_process(error: BaseException) -> EnvironmentProblem | None:
    """The error for the user if ``error`` means that another process has ended, else None."""
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
                hint="look for its message above or below; then start the same command again, it resumes from the last "
                "checkpoint",
            )
        chain = chain.__cause__ or chain.__context__
    return None


def init_process_group(seconds: float | None = None) -> None:
    """Join the process group, unless this process has joined it already.

    Args:
        seconds: timeout of collectives on CPUs, after which a process counts as lost; None: torch's default, half an
            hour.

    Raises:
        EnvironmentProblem: after an elastic restart by torchrun gloo would use the addresses of the old processes.
    """
    import torch
    from accelerate import PartialState

    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "torchrun has restarted the processes with the addresses of the old ones, where gloo cannot reach them",
            code="restart-store",
            hint="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and use --rdzv-backend=c10d; or start the same command "
            "again, it resumes from the last checkpoint",
        )
    waits = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
    if PartialState(**waits).num_processes != world_size():  # another library created it
        PartialState._reset_state()
        joined = PartialState(cpu=not torch.cuda.is_available(), **waits).num_processes
        if joined != world_size():
            raise RuntimeError(f"the launcher started {world_size()} processes and {joined} found each other")
