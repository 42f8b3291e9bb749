"""A Ray cluster for large tables."""

from typing import Annotated

from pydantic import Field

from align.config.base import Count, Positive, Section


class ClusterSection(Section):
    """A Ray cluster whose workers share the shards of a table (docs/scale.md)."""

    address: str = "auto"
    """``auto``: the cluster that this machine belongs to; ``local``: a cluster of this machine alone, for the duration
    of the stage; ``host:6379`` or ``ray://host:10001``: the cluster at that address."""
    workers: Count | None = None
    """Number of workers, each with a copy of the model; default: as many as fit."""
    cpus: Positive = 1.0
    """CPU cores per worker."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs per worker; a fraction lets workers share one."""
