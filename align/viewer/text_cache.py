"""Copy the texts of a pair table into an uncompressed database, which is searched in well under a second.

Run as a process of its own, ``python -m align.viewer.text_cache TARGET FILE...``, so that its memory goes with it; it
prints the number of rows done after each block. A killed one leaves a file ending in ``.part``, which nobody opens.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from align.config.columns import TEXT
from align.data.messages import as_messages, without_nulls
from align.data.text import plain

BATCH = 5_000
BUFFER_BYTES = 1 << 20
SETTINGS = {"force_compression": "uncompressed"}


def text_batches(files: Sequence[Path], columns: Sequence[str] = TEXT) -> Iterator[pa.RecordBatch]:
    """Blocks of rows of all files, in order, in the memory of one block whatever the row groups are."""
    for file in files:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as table:
            yield from table.iter_batches(BATCH, columns=list(columns))


def is_plain(kind: pa.DataType) -> bool:
    """Whether a column holds text, not messages."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def searched(part: pa.Array) -> pa.Array:
    """A column as the text that is searched and compared: messages as plain text, nothing as an empty text."""
    if is_plain(part.type):
        return part.cast(pa.string()).fill_null("")
    return pa.array([plain_text(value) for value in cell_values(part)], pa.string())


def plain_text(value: Any) -> str:
    """A cell as plain text; one that is neither text nor messages as JSON."""
    if value is None:
        return ""
    try:
        return plain(value)
    except (KeyError, TypeError, AttributeError):
        return json.dumps(value, ensure_ascii=False, default=str)


def build(target: Path, files: Sequence[Path]) -> Iterator[int]:
    """Write the database ``target`` and yield the number of rows done after each block."""
    partial = target.with_name(target.name + ".part")
    partial.unlink(missing_ok=True)
    database = duckdb.connect(str(partial), config={"memory_limit": "400MB", "threads": 1})
    for name, value in SETTINGS.items():
        database.execute(f"set {name} = '{value}'")
    database.execute(f"create table texts ({', '.join(f'{name} varchar' for name in TEXT)}, raw varchar)")
    done = 0
    for batch in text_batches(files):
        made = {name: searched(batch.column(name)) for name in TEXT}
        made["raw"] = pa.array(_raw(batch), pa.string())
        database.register("batch", pa.table(made))
        database.execute("insert into texts select * from batch")
        database.unregister("batch")
        done += batch.num_rows
        yield done
    database.close()
    partial.replace(target)


def _raw(batch: pa.RecordBatch) -> list[str | None]:
    """The three cells of each row as JSON, where one of them is messages; else None."""
    if all(is_plain(batch.schema.field(name).type) for name in TEXT):
        return [None] * batch.num_rows
    cells = [cell_values(batch.column(name)) for name in TEXT]
    return [json.dumps(row, ensure_ascii=False, default=str) for row in zip(*cells, strict=True)]


def cell_values(part: pa.Array) -> list[Any]:
    """The cells of a column as a training reads them: text, or messages with the keys of their own row."""
    return [without_nulls(as_messages(value)) for value in part.to_pylist()]


def main() -> None:
    """Build the database that the arguments name."""
    target, *files = map(Path, sys.argv[1:])
    for done in build(target, files):
        sys.stdout.write(f"{done}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
