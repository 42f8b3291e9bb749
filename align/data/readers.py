"""Readers of JSON, JSONL, CSV, TSV and Parquet files, saved datasets and the hub: numbered rows, one by one."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from align.config import PairsSection, nearest
from align.data.messages import as_messages, without_nulls
from align.data.thumbs import thumb_columns
from align.errors import AlignError, DataError
from align.io.console import log
from align.io.object_store import store_problem
from align.io.source_files import SUFFIXES, SourceFile, find_files, table_suffix

READ_ROWS = 4096
CONVERSATIONS = "conversations"
"""Column of the prompt in ShareGPT's layout of pairs, next to one turn as chosen and one as rejected."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number (from 1; in a JSONL file the line) and its values, or why it is unreadable."""

    number: int
    values: dict[str, Any]
    unreadable: str = ""
    file: str = ""
    """Name of the file that the row is in; empty if the source is a single file."""
    raw: dict[str, Any] = field(default_factory=dict)
    """The values as the source has them, under the names of the source."""


def read_source(source: PairsSection) -> tuple[list[Row], set[str]]:
    """All rows of a source with ``source.columns`` applied, and the names of its columns.

    Raises:
        DataError: the source is missing, unreadable or empty; a mapped or required column is missing.
    """
    return read_table(_raw_rows(source), source)


def read_table(raw: Iterable[Row], source: PairsSection) -> tuple[list[Row], set[str]]:
    """``read_source`` of rows that are in memory; ``source.path`` is their name in messages.

    Raises:
        DataError: there is no row; a mapped or required column is missing.
    """
    rows = list(map(_with_messages, raw))
    names, renamed = _columns(source, rows)
    return [replace(row, values=_rename(row.values, renamed)) for row in rows] if renamed else rows, names


def stream_source(source: PairsSection) -> tuple[Iterator[Row], set[str]]:
    """``read_source`` without holding more than a few rows; reads JSONL and CSV twice, Parquet and its footer once.

    Raises:
        DataError: see ``read_source``.
    """
    files = find_files(source.path, source.split)
    if files is not None and all(file.suffix == ".parquet" for file in files):
        names, renamed = _columns(source, _headers(files))
    else:
        names, renamed = _columns(source, _rows(source))
    return (replace(row, values=_rename(row.values, renamed)) for row in _rows(source)), names


def _columns(source: PairsSection, rows: Iterable[Row]) -> tuple[set[str], dict[str, str]]:
    """(columns after renaming, name in the source -> name in the pair table); reads every row."""
    columns: set[str] = set()
    empty, readable = True, False
    for row in rows:
        columns.update(row.values)
        readable = readable or not row.unreadable
        empty = False
    if empty:
        raise DataError(f"{source.path}: holds no rows", code="data-empty", hint="expected one pair per row")
    renamed = _mapped(source, columns)
    columns = {renamed.get(name, name) for name in columns}
    for needed in ("chosen", "rejected"):
        if needed not in thumb_columns(columns) and readable:
            raise DataError(
                f"{source.path}: no column {needed!r}{nearest(needed, sorted(columns))}",
                code="data-column",
                hint=f"map it, e.g. columns: {{{needed}: preferred}}",
            )
    return columns, renamed


def _mapped(source: PairsSection, columns: set[str]) -> dict[str, str]:
    """Name in the source -> name here, of the mapped columns.

    Raises:
        DataError: one of them is not among the ``columns`` of the source.
    """
    for wanted, given in source.columns.items():
        if given not in columns:
            raise DataError(
                f"{source.path}: column {given!r}, mapped to {wanted!r}, is not there{nearest(given, sorted(columns))}",
                code="data-column",
            )
    mapped = {given: wanted for wanted, given in source.columns.items()}
    if "prompt" not in {*mapped.values(), *columns} and CONVERSATIONS in columns - mapped.keys():
        log.info("%s: the column %r is the prompt (as in ShareGPT); another one: columns: {prompt: NAME}", source.path,
                 CONVERSATIONS)  # fmt: skip
        mapped[CONVERSATIONS] = "prompt"
    return mapped


def read_rows(source: PairsSection) -> list[Row]:
    """All rows of a source that need not be pairs, with ``source.columns`` applied.

    Raises:
        DataError: the source is missing or unreadable; a mapped column is missing.
    """
    rows = list(_rows(source))
    if not source.columns or all(row.unreadable for row in rows):
        return rows
    renamed = _mapped(source, {name for row in rows for name in row.values})
    return [replace(row, values=_rename(row.values, renamed)) for row in rows]


def read_files(source: str) -> list[Row]:
    """All rows of the files that ``source`` names; a file with an unknown ending is read as JSONL.

    Raises:
        DataError: a file is missing or unreadable.
    """
    return list(map(_with_messages, _of_files(find_files(source) or [SourceFile(source)])))


def _rows(source: PairsSection) -> Iterator[Row]:
    """Rows of a source; a cell with messages in another form is a list of messages."""
    return map(_with_messages, _raw_rows(source))


def _with_messages(row: Row) -> Row:
    values = {name: as_messages(value) for name, value in row.values.items()}
    return replace(row, values=values, raw=row.raw or row.values)


def _raw_rows(source: PairsSection) -> Iterator[Row]:
    files = find_files(source.path, source.split)
    if files is not None:
        return _of_files(files)
    path = Path(source.path)
    if path.is_dir():
        return numbered_rows(_saved(source))
    if path.is_file() or path.is_absolute() or source.path.startswith("."):
        found = f"a file ending in {path.suffix!r}" if path.is_file() else "nothing"
        raise DataError(
            f"{path}: found {found}, expected a folder of a saved dataset or a file ending in {', '.join(SUFFIXES)}",
            code="data-missing",
        )
    try:
        return numbered_rows(load_dataset(source.path, name=source.subset, split=source.split))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.path}: not a file or folder here, and the hub did not give it ({reason})",
            code="data-hub",
            hint="check the id, pairs.subset, pairs.split and the network",
        ) from None


def _of_files(files: Sequence[SourceFile]) -> Iterator[Row]:
    """Rows of all files."""
    _refuse_other_columns(files)
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".parquet": _parquet}
    for file in files:
        for row in readers.get(file.suffix, _jsonl)(file):
            yield row if len(files) == 1 else replace(row, file=file.name)


def _headers(files: Sequence[SourceFile]) -> Iterator[Row]:
    """One row of column names without values per Parquet file that is not empty, read from its footer."""
    _refuse_other_columns(files)
    for file in files:
        with _opened(file) as table:
            if table.metadata.num_rows:
                yield Row(0, dict.fromkeys(table.schema_arrow.names))


def _refuse_other_columns(files: Sequence[SourceFile]) -> None:
    """Raise if Parquet files, which are parts of one table, differ in their columns."""
    parts = [file for file in files if file.suffix == ".parquet"]
    first: list[str] | None = None
    for file in parts if len(parts) > 1 else []:
        with _opened(file) as table:
            names = sorted(table.schema_arrow.names)
        first = first or names
        if names != first:
            odd = sorted(set(names) ^ set(first))
            raise DataError(
                f"{file.name}: found columns that differ from {parts[0].name} ({', '.join(odd)}), expected one table",
                code="data-column",
                hint="name one file, or a pattern that matches the parts of one table",
            )


def _no_table(path: str, reason: str) -> DataError:
    """The error for a folder that holds no table, or the parts of one, which a pattern has to name."""
    folder = Path(path)
    known = {*SUFFIXES} - {".json"}  # which may be a model's, or anything's
    parts = sorted(file.name for file in folder.iterdir() if table_suffix(file.name) in known) if path else []
    problem, hint = f"not a folder written by save_to_disk ({reason})", ""
    if parts:
        problem = f"found a folder of {', '.join(parts[:3])}, expected Parquet files, or files named by split"
        hint = f"give a pattern for the parts of one table: '{folder}/*{table_suffix(parts[0])}'"
    elif path and (inner := sorted(file for file in folder.glob("*/*") if table_suffix(file.name) in known)):
        names = sorted({file.parent.name for file in inner})
        first = next((file for file in inner if file.parent.name == "train"), inner[0])
        problem = f"found folders with tables ({', '.join(names[:3])}), expected one table"
        hint = f"name one of them: '{first.parent}/*{table_suffix(first.name)}'"
    return DataError(f"{path or repr(path)}: {problem}", code="data-unreadable", hint=hint)


def _saved(source: PairsSection) -> Dataset:
    try:
        loaded = load_from_disk(source.path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _no_table(source.path, reason) from None
    if isinstance(loaded, DatasetDict):
        if source.split not in loaded:
            raise DataError(
                f"{source.path}: no split {source.split!r}{nearest(source.split, sorted(loaded))}", code="data-split"
            )
        return loaded[source.split]
    return loaded


def numbered_rows(dataset: Dataset, *, first: int = 1) -> Iterator[Row]:
    """Rows with Python's own values, whatever the format that the dataset was saved with, numbered from ``first``."""
    exact = {name for name, feature in dataset.features.items() if "Json(" in repr(feature)}
    for number, values in enumerate(dataset.with_format(None), first):
        cells = {name: value if name in exact else without_nulls(value) for name, value in values.items()}
        yield Row(number, cells, raw=values)


def _jsonl(file: SourceFile) -> Iterator[Row]:
    return _json_rows(_lines(file))


def _json_rows(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            yield Row(
                number, {}, f"found invalid JSON ({error.msg} at column {error.colno}), expected one object per line"
            )
            continue
        except RecursionError:
            yield Row(number, {}, "found JSON nested too deeply, expected one object per line")
            continue
        except ValueError as error:
            yield Row(number, {}, f"found {error}, expected one object per line")
            continue
        yield _object_row(number, values)


def _object_row(number: int, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(number, values)
    return Row(number, {}, f"found a JSON {type(values).__name__}, expected an object")


def _json(file: SourceFile) -> Iterator[Row]:
    """Rows of an array of objects, also as the only value of an object; of one object; or of an object per line."""
    text = "".join(_lines(file))
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or not text.strip():
            return _json_rows(text.splitlines())
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"found {error}"
    else:
        if isinstance(values, dict):
            (only, *others) = [*values.values(), None]
            values = only if isinstance(only, list) and others == [None] else [values]
        if isinstance(values, list):
            return (_object_row(number, item) for number, item in enumerate(values, 1))
        reason = f"found a JSON {type(values).__name__}"
    hint = "expected an array of objects, or one object per line"
    raise DataError(f"{file.name}: not a table in JSON ({reason})", code="data-unreadable", hint=hint)


def _csv(file: SourceFile) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    reader = csv.reader(_lines(file, newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, None)
        if header is None:
            return
        _refuse_twice(header, f"{file.name}:row 1")
        for number, fields in enumerate(reader, 1):
            if len(fields) == len(header):
                values = {name: value if value != "" else None for name, value in zip(header, fields, strict=True)}
                yield Row(number, values)
            else:
                yield Row(number, {}, f"found {len(fields)} fields, expected {len(header)} as in the header")
    except csv.Error as error:
        raise DataError(f"{file.name}:line {reader.line_num}: {error}", code="data-unreadable") from None


def _parquet(file: SourceFile) -> Iterator[Row]:
    number = 0
    for batch in _batches(file):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(f"{file.name}: a text is not UTF-8 ({error.reason})", code="data-encoding") from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise DataError(f"{file.name}: a value cannot be read ({error})", code="data-unreadable") from None
        for values in rows:
            number += 1
            yield Row(number, {name: without_nulls(value) for name, value in values.items()}, raw=values)


def _batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    """Batches of ``READ_ROWS`` rows of a Parquet file."""
    with _opened(file) as table:
        try:
            yield from table.iter_batches(batch_size=READ_ROWS)
        except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
            raise _not_parquet(file, error) from None


@contextmanager
def _opened(file: SourceFile) -> Iterator[pq.ParquetFile]:
    with file.open() as content:
        try:
            table = pq.ParquetFile(content, pre_buffer=False)  # which would hold all that has been read
            names = table.schema_arrow.names
        except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # a damaged column name: ValueError
            raise _not_parquet(file, error) from None
        _refuse_twice(names, file.name)
        with table:
            yield table


def _not_parquet(file: SourceFile, error: Exception) -> AlignError:
    if file.filesystem is not None and isinstance(error, OSError) and "AWS Error" in str(error):
        return store_problem(file.name, error)
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{file.name}: not a readable Parquet file ({reason})", code="data-unreadable")


def _lines(file: SourceFile, newline: str | None = None) -> Iterator[str]:
    try:
        with file.text(newline=newline) as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name}: not UTF-8 (byte {error.start}: {error.reason})",
            code="data-encoding",
            hint="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from None
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror or error})", code="data-missing") from None
    except ValueError as error:
        if isinstance(error, AlignError):
            raise
        raise DataError(f"{file.name!r}: cannot be read ({error})", code="data-missing") from None


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses a duplicate key, which would lose a value."""
    values = dict(items)
    if len(values) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return values


def _refuse_twice(names: Sequence[str], where: str) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"{where}: column {twice!r} is there twice", code="data-column")


def _rename(values: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """Rename columns; a column whose name is the target of another rename is dropped unless it is renamed as well."""
    taken = renamed.values()
    return {renamed.get(name, name): value for name, value in values.items() if name in renamed or name not in taken}
