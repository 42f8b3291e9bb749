"""Rows of a pair source, one by one with their numbers: JSONL, CSV, Parquet, a saved dataset, the hub."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from align.config import PairsConfig, nearest
from align.errors import DataError

SUFFIXES = (".jsonl", ".csv", ".parquet")
READ_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number (1-based; the line in a JSONL file) and its values, or what makes it unreadable."""

    number: int
    values: dict[str, Any]
    unreadable: str = ""


def read_source(source: PairsConfig) -> tuple[list[Row], set[str]]:
    """All rows of a source with ``source.columns`` applied, and the names of its columns.

    Raises:
        DataError: missing, unreadable or empty source; a column that is mapped or needed is not there.
    """
    rows = list(_rows(source))
    names, renamed = _columns(source, rows)
    if renamed:
        rows = [Row(row.number, _rename(row.values, renamed), row.unreadable) for row in rows]
    return rows, names


def stream_source(source: PairsConfig) -> tuple[Iterator[Row], set[str]]:
    """As ``read_source``, reading the source twice and never holding more than a few of its rows.

    Raises:
        DataError: as ``read_source``.
    """
    names, renamed = _columns(source, _rows(source))
    rows = (Row(row.number, _rename(row.values, renamed), row.unreadable) for row in _rows(source))
    return rows, names


def _columns(source: PairsConfig, rows: Iterable[Row]) -> tuple[set[str], dict[str, str]]:
    """(columns once renamed, name in the source -> name in the pair table) after a look at every row."""
    columns: set[str] = set()
    empty, readable = True, False
    for row in rows:
        columns.update(row.values)
        readable = readable or not row.unreadable
        empty = False
    if empty:
        raise DataError(f"{source.path}: holds no rows", code="data-empty", hint="expected one pair per row")
    for wanted, given in source.columns.items():
        if given not in columns:
            raise DataError(
                f"{source.path}: column {given!r}, mapped to {wanted!r}, is not there{nearest(given, sorted(columns))}",
                code="data-column",
            )
    renamed = {given: wanted for wanted, given in source.columns.items()}
    columns = {renamed.get(name, name) for name in columns}
    for needed in ("chosen", "rejected"):
        if needed not in columns and readable:
            raise DataError(
                f"{source.path}: no column {needed!r}{nearest(needed, sorted(columns))}",
                code="data-column",
                hint=f"map it, e.g. columns: {{{needed}: preferred}}",
            )
    return columns, renamed


def read_jsonl(path: Path) -> list[Row]:
    """The lines of a JSONL file.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    rows = list(_jsonl(path))
    for row in rows:
        if row.unreadable:
            raise DataError(f"{path}:row {row.number}: {row.unreadable}", code="data-row")
    return rows


def read_rows(source: PairsConfig) -> list[Row]:
    """All rows of a source as they are.

    Raises:
        DataError: the source is missing or unreadable.
    """
    return list(_rows(source))


def _rows(source: PairsConfig) -> Iterator[Row]:
    path = Path(source.path)
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix in readers:
        if not path.is_file():
            found = "found a folder, expected a file" if path.is_dir() else "no such file"
            raise DataError(f"{path}: {found}", code="data-missing", hint="check pairs.path")
        return readers[path.suffix](path)
    if path.is_dir():
        return _numbered(_saved(source))
    if path.is_file() or path.is_absolute() or source.path.startswith("."):
        found = f"a file ending in {path.suffix!r}" if path.is_file() else "nothing"
        raise DataError(
            f"{path}: found {found}, expected a folder of a saved dataset or a file ending in {', '.join(SUFFIXES)}",
            code="data-missing",
        )
    try:
        return _numbered(load_dataset(source.path, name=source.subset, split=source.split))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.path}: not a file or folder here, and the hub did not give it ({reason})",
            code="data-hub",
            hint="check the id, pairs.subset, pairs.split and the network",
        ) from None


def _saved(source: PairsConfig) -> Dataset:
    try:
        loaded = load_from_disk(source.path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.path}: not a folder written by save_to_disk ({reason})",
            code="data-unreadable",
        ) from None
    if isinstance(loaded, DatasetDict):
        if source.split not in loaded:
            raise DataError(
                f"{source.path}: no split {source.split!r}{nearest(source.split, sorted(loaded))}", code="data-split"
            )
        return loaded[source.split]
    return loaded


def _numbered(dataset: Dataset) -> Iterator[Row]:
    return (Row(number, dict(values)) for number, values in enumerate(dataset, 1))


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
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
        if isinstance(values, dict):
            yield Row(number, values)
        else:
            yield Row(number, {}, f"found a JSON {type(values).__name__}, expected an object")


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path, newline=True), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _refuse_twice(header, f"{path}:row 1")
        for number, fields in enumerate(reader, 1):
            if len(fields) == len(header):
                values = {name: value if value != "" else None for name, value in zip(header, fields, strict=True)}
                yield Row(number, values)
            else:
                yield Row(number, {}, f"found {len(fields)} fields, expected {len(header)} as in the header")
    except csv.Error as error:
        raise DataError(f"{path}:line {reader.line_num}: {error}", code="data-unreadable") from None


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    for batch in _batches(path):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: a text is not UTF-8 ({error.reason})", code="data-encoding") from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise DataError(f"{path}: a value cannot be read ({error})", code="data-unreadable") from None
        for values in rows:
            number += 1
            yield Row(number, values)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A Parquet file, ``READ_ROWS`` rows at a time."""
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # a damaged column name is a ValueError
        raise _not_parquet(path, error) from None
    _refuse_twice(names, str(path))
    try:
        yield from file.iter_batches(batch_size=READ_ROWS)
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from None


def _not_parquet(path: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{path}: not a readable Parquet file ({reason})", code="data-unreadable")


def _lines(path: Path, newline: bool = False) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="" if newline else None) as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start}: {error.reason})",
            code="data-encoding",
            hint="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", code="data-missing") from None
    except ValueError as error:
        raise DataError(f"{str(path)!r}: cannot be read ({error})", code="data-missing") from None


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is there twice would lose a value."""
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
    kept: Sequence[tuple[str, Any]] = [item for item in values.items() if item[0] not in renamed.values()]
    return {renamed.get(name, name): value for name, value in kept}
