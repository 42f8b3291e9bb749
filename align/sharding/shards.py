"""Work on a table shard by shard; a finished shard is a file, and is never done again whoever finishes the rest.

The shards of a table lie in one folder, named after their first row. They are made one after the other in this process,
shared out over the processes of a launcher, or sent to the workers of a Ray cluster (align/sharding/ray_cluster.py);
no caller needs to know which.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from align.config import ClusterSection
from align.distributed import rank_share, wait_until
from align.io.console import progress
from align.io.files import atomic_write
from align.sharding.jobs import Job, Rows, encode, read_table


@dataclass(frozen=True, slots=True)
class Shards:
    """The results, shard by shard in the order of the table, each once every process has finished its own."""

    folder: Path
    total: int
    size: int

    def __iter__(self) -> Iterator[Dataset]:
        """Each into memory and into no cache."""
        files = [_file(self.folder, start) for start in range(0, self.total, self.size)]
        wait_until(lambda: all(file.exists() for file in files))
        return map(read_table, files)

    def whole(self) -> Dataset:
        """All of them as one table."""
        return concatenate_datasets(list(self))


def map_shards(
    table: Rows,
    job: Job,
    folder: Path,
    *,
    size: int,
    what: str,
    cluster: ClusterSection | None = None,
    together: bool = False,
    processes: int = 1,
) -> Shards:
    """Make the shards that ``folder`` lacks.

    Args:
        table: rows to work on, at least one.
        job: what is done; started only where a shard is missing.
        folder: of the shards; valid for this table, this job and this size only.
        size: rows of a shard.
        what: shown to the user meanwhile.
        cluster: send the shards to its workers; None: they are worked on here.
        together: all processes of a launcher call this, and each works on its share and gets the whole.
        processes: that work at the same time here, where there are at least two shards for each of them.

    Raises:
        AlignError: what the work raises, or a cluster that cannot be used.
    """
    starts = range(0, len(table), size)
    missing = _missing(folder, rank_share(starts) if together else starts)
    if missing and cluster is not None:
        from align.sharding.ray_cluster import map_on_cluster

        keep = partial(_keep_in, folder)
        map_on_cluster(job, missing, partial(_rows, table, size), cluster, keep, what=what)
    elif len(missing) >= 2 * processes > 2:
        begin = (job, table, size, folder)
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_Process, initargs=begin) as pool:
            for _ in progress(
                pool.map(_Process.make, missing), what=what, total=len(missing), unit=f"shards of {size}"
            ):
                pass
    elif missing:
        work = job.start()
        _make(missing, size, folder, lambda start: work(_rows(table, size, start)), what=what)
    return Shards(folder, len(table), size)


def in_parts(total: int, size: int, folder: Path, work: Callable[[range], Dataset], *, what: str) -> Dataset:
    """The rows that ``work`` makes of the numbers 0..total-1, ``size`` at a time, in this process.

    Args:
        total: number of rows, at least 1.
        size: rows per shard; must be the same when the work goes on.
        folder: where the finished shards lie.
        work: makes the rows of a range.
        what: shown to the user while it runs.
    """
    missing = _missing(folder, range(0, total, size))
    _make(missing, size, folder, lambda start: work(range(start, min(start + size, total))), what=what)
    return Shards(folder, total, size).whole()


class _Process:
    """What a process of this machine works with, loaded as it starts."""

    made: "_Process"

    def __init__(self, job: Job, table: Rows, size: int, folder: Path) -> None:
        self.work, self.table, self.size, self.folder = job.start(), table, size, folder
        _Process.made = self

    @staticmethod
    def make(start: int) -> None:
        """One shard."""
        own = _Process.made
        _keep_in(own.folder, start, encode(own.work(_rows(own.table, own.size, start))))


def _rows(table: Rows, size: int, start: int) -> Dataset:
    return table.select(range(start, min(start + size, len(table))))


def _missing(folder: Path, starts: Sequence[int]) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    return [start for start in starts if not _file(folder, start).exists()]


def _make(missing: list[int], size: int, folder: Path, make: Callable[[int], Dataset], *, what: str) -> None:
    for start in progress(missing, what=what, total=len(missing), unit=f"shards of {size}"):
        _keep_in(folder, start, encode(make(start)))


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:08d}.parquet"


def _keep_in(folder: Path, start: int, content: bytes) -> None:
    with atomic_write(_file(folder, start)) as temporary:
        temporary.write_bytes(content)
