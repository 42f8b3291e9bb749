"""Map a job over a long table to memory-mapped arrays with a value per row; a stopped run resumes."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from align.config import ClusterSection
from align.io.files import atomic_folder
from align.sharding.jobs import Job, Rows
from align.sharding.shards import Shards, map_shards

ROWS = 8192
COLUMNS, SHARDS = "columns", "shards"
Arrays = dict[str, np.ndarray]


def map_arrays(
    table: Rows,
    job: Job,
    folder: Path,
    *,
    what: str,
    rows: int = ROWS,
    cluster: ClusterSection | None = None,
    processes: int = 1,
) -> Arrays:
    """The columns of the result of ``job`` on ``table``, [N, ...] each, memory-mapped from ``folder``.

    Args:
        table: input, at least one row.
        job: gives a table of ``as_table`` with one row per input row.
        folder: cache; valid for this table, job and ``rows`` only.
        what: name of the work in the progress bar.
        rows: rows per shard.
        cluster: Ray cluster that processes the shards.
        processes: number of processes of this machine that do so without a cluster.

    Raises:
        AlignError: an error of the job, or the cluster cannot be used.
    """
    columns, shards = folder / COLUMNS, folder / SHARDS
    if not columns.exists():
        made = map_shards(table, job, shards, size=rows, what=what, cluster=cluster, processes=processes)
        with atomic_folder(columns) as temporary:
            _store(made, temporary)
    shutil.rmtree(shards, ignore_errors=True)
    return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in columns.glob("*.npy")}


def as_table(arrays: Arrays) -> Dataset:
    """Arrays, [n] or [n, D] each, as the columns of a table with n rows."""
    return Dataset(pa.table({name: _column(np.ascontiguousarray(values)) for name, values in arrays.items()}))


def as_array(table: Dataset, name: str) -> np.ndarray:
    """One column of a table of ``as_table`` as an array, [n] or [n, D]."""
    column = table.data.column(name).combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy(zero_copy_only=False)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _store(shards: Shards, folder: Path) -> None:
    files: dict[str, np.memmap] = {}
    start = 0
    for shard in shards:
        for name in shard.column_names:
            part = as_array(shard, name)
            if name not in files:
                shape = (shards.total, *part.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", part.dtype, shape)
            files[name][start : start + len(part)] = part
        start += len(shard)
    for stored in files.values():
        stored.flush()
