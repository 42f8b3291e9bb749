"""Rows made in parts, each kept once it is whole: a process that is killed loses at most the part it was in."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from align.console import progress


def in_parts(total: int, size: int, folder: Path, work: Callable[[range], Dataset], *, what: str) -> Dataset:
    """The rows 0..total-1, ``size`` at a time; a part that lies in ``folder`` is read instead of made again.

    Args:
        total: number of rows, at least 1.
        size: rows per part; must be the same when the work goes on.
        folder: where the finished parts lie.
        work: makes the rows of a range.
        what: shown to the user while it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, total, size)
    done = []
    for start in progress(starts, what=what, total=len(starts), unit=f"parts of {size}"):
        file = folder / f"{start:08d}.parquet"
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            work(range(start, min(start + size, total))).to_parquet(str(temporary))
            temporary.replace(file)
        done.append(read_table(file))
    return concatenate_datasets(done)


def read_table(file: Path) -> Dataset:
    """The table of a Parquet file, read into memory and into no cache."""
    return Dataset(pq.read_table(file, partitioning=None))
