"""Work on a table shard by shard; a finished shard is a file, and is never done again whoever finishes the rest.

The shards of a table lie in one folder, named after their first row. They are made one after the other in this process,
shared out over the processes of a launcher, or sent to the workers of a Ray cluster (align/cluster.py); no caller needs
to know which.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from align.config import ClusterConfig
from align.console import progress
from align.processes import own_share, wait_until

Work = Callable[[Dataset], Dataset]
"""Rows of the table -> rows of the result, as many or fewer."""


class Job(Protocol):
    """What is done to every shard. For a cluster it is pickled: settings and names, no model and no open file."""

    def start(self) -> Work:
        """Load what the work needs; called once in each process that works."""


def map_shards(
    table: Dataset,
    job: Job,
    folder: Path,
    *,
    size: int,
    what: str,
    cluster: ClusterConfig | None = None,
    together: bool = False,
) -> None:
    """Make the shards that ``folder`` lacks; ``gathered`` reads them.

    Args:
        table: rows to work on, at least one.
        job: what is done; started only where a shard is missing.
        folder: of the shards; valid for this table, this job and this size only.
        size: rows of a shard.
        what: shown to the user meanwhile.
        cluster: send the shards to its workers; None: they are worked on here.
        together: all processes of a launcher call this, and each works on its share.

    Raises:
        AlignError: what the work raises, or a cluster that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(table), size)
    missing = [start for start in (own_share(starts) if together else starts) if not _file(folder, start).exists()]
    if cluster is not None and missing:
        from align.cluster import map_on_cluster

        rows = {start: table.select(range(start, min(start + size, len(table)))) for start in missing}
        map_on_cluster(job, rows, cluster, lambda start, made: _keep(_file(folder, start), made), what=what)
        return
    work: Work | None = None
    for start in progress(missing, what=what, total=len(missing), unit=f"shards of {size}"):
        work = work or job.start()
        made = work(table.select(range(start, min(start + size, len(table)))))
        _keep(_file(folder, start), encode(made))


def gathered(folder: Path, total: int, size: int) -> Dataset:
    """The results of all shards in the order of the table, once every process has finished its own."""
    files = [_file(folder, start) for start in range(0, total, size)]
    wait_until(lambda: all(file.exists() for file in files))
    return concatenate_datasets([read_table(file) for file in files])


def in_parts(total: int, size: int, folder: Path, work: Callable[[range], Dataset], *, what: str) -> Dataset:
    """The rows that ``work`` makes of the numbers 0..total-1, ``size`` at a time, in this process.

    Args:
        total: number of rows, at least 1.
        size: rows per shard; must be the same when the work goes on.
        folder: where the finished shards lie.
        work: makes the rows of a range.
        what: shown to the user while it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, total, size)
    for start in progress(starts, what=what, total=len(starts), unit=f"parts of {size}"):
        file = _file(folder, start)
        if not file.exists():
            _keep(file, encode(work(range(start, min(start + size, total)))))
    return gathered(folder, total, size)


def read_table(file: Path) -> Dataset:
    """The table of a Parquet file, read into memory and into no cache."""
    return Dataset(pq.read_table(file, partitioning=None))


def encode(table: Dataset) -> bytes:
    """A table as a Parquet file, its features with it."""
    stream = io.BytesIO()
    table.to_parquet(stream)
    return stream.getvalue()


def decode(file: bytes) -> Dataset:
    """The table that ``encode`` wrote."""
    return Dataset(pq.read_table(io.BytesIO(file)))


def finished(folder: Path) -> Sequence[int]:
    """First rows of the shards that are whole."""
    return sorted(int(file.stem) for file in folder.glob("*.parquet"))


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:08d}.parquet"


def _keep(file: Path, content: bytes) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(file)
