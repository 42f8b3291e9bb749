"""Protocol of a job over a table in shards, and its tables as Parquet bytes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq
from datasets import Dataset

from align.io.parquet import ROW_GROUP

Work = Callable[[Dataset], Dataset]
"""Rows of a shard -> rows of the result, at most as many."""


class Job(Protocol):
    """Work on a shard. A job is pickled for other processes, so it holds settings and names, no model or open file."""

    def start(self) -> Work:
        """Load what the work needs; called once in each worker process."""


class Rows(Protocol):
    """Input of a job: a Dataset, or an object that builds one for a range of rows."""

    def __len__(self) -> int:
        """Number of rows."""

    def select(self, indices: range) -> Dataset:
        """The rows of a range."""


def read_table(file: Path) -> Dataset:
    """The table of a Parquet file, in memory, without a cache of datasets."""
    return Dataset(pq.read_table(file, partitioning=None))


def encode(table: Dataset) -> bytes:
    """A table with its features as Parquet bytes."""
    stream = io.BytesIO()
    table.to_parquet(stream, batch_size=ROW_GROUP)
    return stream.getvalue()


def decode(file: bytes) -> Dataset:
    """The table of the bytes of ``encode``."""
    return Dataset(pq.read_table(io.BytesIO(file)))
