"""Where the shards of a large table are worked on."""

from typing import Annotated

from pydantic import Field

from align.config.base import Count, Positive, Section


class ClusterSection(Section):
    """A Ray cluster whose workers share the shards of a table (docs/scale.md)."""

    address: str = "auto"
    """``auto``: the cluster that this machine belongs to; ``local``: one of this machine alone, for the time of the
    stage; ``host:6379`` or ``ray://host:10001``: that one."""
    workers: Count | None = None
    """Workers, each with a copy of the model; absent: as many as fit."""
    cpus: Positive = 1.0
    """CPUs of a worker."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of a worker."""
