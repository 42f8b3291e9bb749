"""Columns of a source that the program does not read, carried unchanged into the tables of commands that keep rows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from align.config.columns import COLUMNS

KNOWN = frozenset(column.name for column in COLUMNS)
WRITTEN = frozenset(column.name for column in COLUMNS if not column.loaded)
"""Columns that a stage writes and loading does not read."""
SAMPLED = frozenset({"sample", "completion", "tokens", "finish_reason", "token_ids", "logprobs"})
"""Columns of a table of completions that a sampler writes."""
FILTERED = "importance"
"""Column by which a filter's own table is recognized."""


def user_columns(columns: set[str]) -> list[str]:
    """The columns that the program neither reads nor writes, sorted."""
    return sorted(columns - KNOWN)


def user_cells(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of rows of prompts or completions that the program neither reads nor writes, sorted.

    Each row may have other columns.
    """
    return sorted({name for row in rows for name in row} - KNOWN - SAMPLED)


def unused_columns(columns: set[str]) -> list[str]:
    """The columns of a source that loading does not read, sorted; of a filter's table, without those of the filter."""
    ours = set() if FILTERED not in columns else WRITTEN
    return sorted(columns - (KNOWN - WRITTEN) - ours)


def user_array(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """A user's column [N] as Arrow: of the type ``kind``, else of the type that holds all values, else as JSON texts.

    Values of several kinds, and objects whose keys differ between rows, become JSON texts: one Arrow type would change
    them (a struct gives each row the keys of all others).
    """
    if kind is None:
        try:
            found = pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            found = None
        kind = pa.json_() if found is None or _changes(found, values) else found.type
    if kind != pa.json_():
        return pa.array(values, type=kind)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.array(texts, pa.json_())


def wider(first: pa.DataType | None, second: pa.DataType) -> pa.DataType:
    """The type of a column whose rows so far have the type ``first`` and whose next rows have ``second``."""
    if first is None or first == second or pa.types.is_null(first):
        return second
    if pa.types.is_null(second):
        return first
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if {first, second} == numbers else pa.json_()


def _changes(found: pa.Array, values: Sequence[Any]) -> bool:
    """Whether nested values read back differently, or cannot be written to Parquet (an object without keys)."""
    if not pa.types.is_nested(found.type):
        return False
    return "struct<>" in str(found.type) or found.to_pylist() != list(values)
