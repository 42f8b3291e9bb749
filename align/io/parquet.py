"""Parquet files whose rows can be read a few at a time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 10_000
"""Rows per row group, at most. A reader decodes whole groups: of a table of a million pairs in one group, reading one
pair takes the memory of all of them."""


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write a table with row groups of at most ``ROW_GROUP`` rows; the same table gives the same bytes."""
    pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP)
