"""Map a job over a table shard by shard; each finished shard is a file, which a resumed run does not compute again.

The shards of a table are in one folder, named after their first row. They are computed in this process, in several
processes of this machine, by the processes of a launcher, or on a Ray cluster (align/sharding/ray_cluster.py); the
result is the same.
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
    """The results, shard by shard in the order of the table; iteration waits until all files exist."""

    folder: Path
    total: int
    size: int

    def __iter__(self) -> Iterator[Dataset]:
        """Each shard, read into memory."""
        files = [_file(self.folder, start) for start in range(0, self.total, self.size)]
        wait_until(lambda: all(file.exists() for file in files))
        return map(read_table, files)

    def whole(self) -> Dataset:
        """All shards, concatenated."""
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
    """Compute the shards that are missing in ``folder``.

    Args:
        table: input, at least one row.
        job: the work; started only if a shard is missing.
        folder: folder of the shards; valid for this table, job and size only.
        size: rows per shard.
        what: name of the work in the progress bar.
        cluster: Ray cluster that processes the shards; None: this machine.
        together: all processes of a launcher call this; each computes its share, and all get all shards.
        processes: number of processes of this machine, used if each has at least two shards.

    Raises:
        AlignError: an error of the job, or the cluster cannot be used.
    """
    starts = range(0, len(table), size)
    missing = _missing(folder, rank_share(starts) if together else starts)
    if missing and cluster is not None:
        from align.sharding.ray_cluster import map_on_cluster

        keep = partial(_write, folder)
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
    """Concatenated results of ``work`` on ranges of 0..total-1, ``size`` numbers at a time, in this process.

    Args:
        total: number of rows, at least 1.
        size: rows per shard; must be the same when the work resumes.
        folder: folder of the finished shards.
        work: computes the rows of a range.
        what: name of the work in the progress bar.
    """
    missing = _missing(folder, range(0, total, size))
    _make(missing, size, folder, lambda start: work(range(start, min(start + size, total))), what=what)
    return Shards(folder, total, size).whole()


class _Process:
    """State of a worker process of this machine, loaded when it starts."""

    made: "_Process"

    def __init__(self, job: Job, table: Rows, size: int, folder: Path) -> None:
        self.work, self.table, self.size, self.folder = job.start(), table, size, folder
        _Process.made = self

    @staticmethod
    def make(start: int) -> None:
        """Compute one shard."""
        own = _Process.made
        _write(own.folder, start, encode(own.work(_rows(own.table, own.size, start))))


def _rows(table: Rows, size: int, start: int) -> Dataset:
    return table.select(range(start, min(start + size, len(table))))


def _missing(folder: Path, starts: Sequence[int]) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    return [start for start in starts if not _file(folder, start).exists()]


def _make(missing: list[int], size: int, folder: Path, make: Callable[[int], Dataset], *, what: str) -> None:
    for start in progress(missing, what=what, total=len(missing), unit=f"shards of {size}"):
        _write(folder, start, encode(make(start)))


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:08d}.parquet"


def _write(folder: Path, start: int, content: bytes) -> None:
    with atomic_write(_file(folder, start)) as temporary:
        temporary.write_bytes(content)
