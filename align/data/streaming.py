"""Pair tables larger than memory: read and validated row by row, kept in one memory-mapped Arrow file."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from align.config import PairsSection
from align.config.columns import NUMBERS, OPTIONAL, SCORES, TEXT
from align.data.pair_chunks import Types, record_batch, widened
from align.data.pairs import describe_unused, identify, other_kind, unusable
from align.data.readers import stream_source
from align.data.sampling import fair_sample, report_sample
from align.data.seen_ids import SeenIds
from align.data.user_columns import unused_columns, user_columns
from align.data.validation import Problem, RowReader
from align.errors import DataError
from align.io.console import log
from align.io.files import atomic_write

BATCH = 4096
REVISION = 3
"""Raise it when the same source gives another table; part of the key of a kept table."""


def stream_pairs(source: PairsSection, file: Path, *, carry: bool = False) -> Dataset:
    """The valid pairs of a source as ``load_pairs`` gives them, memory-mapped from ``file``, which is written once.

    Args:
        source: where the pairs come from.
        file: Arrow file to keep them in; read again on later calls, so it must belong to this source alone.
        carry: keep the columns that the program does not read, unchanged.

    Raises:
        DataError: the source or its rows are invalid, see ``load_pairs``.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        types: Types | None = {}
        drawn = None if source.limit is None else _drawn(source, source.limit, file.with_suffix(".ids"))
        with atomic_write(file) as temporary:
            while types is not None:
                with closing(SeenIds(file.with_suffix(".ids"))) as seen:
                    types = _write(source, temporary, seen, types, drawn, carry=carry)
    pairs = Dataset.from_file(str(file))
    unused = [name for name in OPTIONAL if name in pairs.column_names and _is_empty(pairs, name)]
    return pairs.remove_columns(unused) if unused else pairs


class _Reader:
    """Yields the valid pairs of a source one by one; collects the problems and counts the invalid rows."""

    def __init__(self, source: PairsSection, seen: SeenIds, *, carry: bool = False) -> None:
        self.path = source.path
        self.rows, self.columns = stream_source(source)
        self.reader = RowReader(source.path, self.columns)
        self.seen = seen
        self.own = user_columns(self.columns) if carry else []
        self.first: dict[str, Any] | None = None
        self.problems: list[Problem] = []
        self.invalid = 0

    def pairs(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            pair, found = self.reader.read(row)
            if pair is not None:
                self.first = self.first or pair
                pair["id"] = identify(pair, row, self.seen, self.path, found)
                found += other_kind(pair, self.first, row, self.path)
            if found:
                self.problems += found
                self.invalid += 1
            elif pair is not None:
                yield pair | {name: row.raw.get(name) for name in self.own}


def _drawn(source: PairsSection, limit: int, ids: Path) -> set[int]:
    """Places of a fair sample of the valid pairs, by a pass over the source."""
    with closing(SeenIds(ids)) as seen:
        drawn, total = fair_sample((str(pair["id"]) for pair in _Reader(source, seen).pairs()), limit)
    report_sample(source.path, len(drawn), total, "pairs")
    return set(drawn)


def _write(
    source: PairsSection, file: Path, seen: SeenIds, types: Types, drawn: set[int] | None, *, carry: bool
) -> Types | None:
    """Write the table, of the pairs at the places ``drawn`` if given. If ``types`` cannot hold the values, stop and
    return types that can, else None."""
    reader = _Reader(source, seen, carry=carry)
    pairs = (pair for place, pair in enumerate(reader.pairs()) if drawn is None or place in drawn)
    first = next(pairs, None)
    kept = 0
    if first is not None:
        batch = [first, *islice(pairs, BATCH - 1)]
        types = types or widened({}, batch, reader.own, source.path)
        given = reader.columns | ({"margin"} if set(SCORES[:2]) <= reader.columns else set())
        numbers = [name for name in OPTIONAL if name in given]
        fields = [("id", pa.string()), *((name, types[name]) for name in TEXT)]
        fields += [(name, pa.float64() if name in NUMBERS else pa.string()) for name in numbers]
        schema = pa.schema(fields + [(name, types[name]) for name in reader.own])
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch:
                if (found := widened(types, batch, reader.own, source.path)) != types:
                    return found
                writer.write_batch(record_batch(batch, schema, source.path))
                kept += len(batch)
                batch = list(islice(pairs, BATCH))
    if reader.problems and not source.drop_invalid:
        raise unusable(source.path, reader.problems, reader.invalid)
    if unused := unused_columns(reader.columns):
        log.info("%s: %s", source.path, describe_unused(unused))
    if reader.invalid:
        log.warning("%s: left out %d invalid rows of %d", source.path, reader.invalid, reader.invalid + kept)
    if kept == 0:
        raise DataError(f"{source.path}: no valid pair", code="data-empty", hint="look at `align data check`")
    return None


def _is_empty(pairs: Dataset, name: str) -> bool:
    column = pairs.data.column(name)
    return bool(column.null_count == len(column))
