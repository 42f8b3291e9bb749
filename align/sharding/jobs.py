"""A job over a table in shards: the protocol, and how its results are written and read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq
from datasets import Dataset

Work = Callable[[Dataset], Dataset]
"""Rows of the table -> rows of the result, as many or fewer."""


class Job(Protocol):
    """What is done to every shard. Elsewhere it arrives pickled: settings and names, no model and no open file."""

    def start(self) -> Work:
        """Load what the work needs; called once in each process that works."""


class Rows(Protocol):
    """What is worked on: a table, or what makes one of any of its rows."""

    def __len__(self) -> int:
        """Rows."""

    def select(self, indices: range) -> Dataset:
        """Some of them."""


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
