"""The result of a filter and the tables that it is written to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from align.errors import DataError
from align.filtering.selection import RobustScale
from align.io.files import atomic_write
from align.io.parquet import ROW_GROUP, write_parquet

KEPT, DROPPED, SUMMARY = "kept.parquet", "dropped.parquet", "filter.json"
WRITTEN_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Reasons:
    """Reasons why pairs were dropped, formatted on request."""

    broken: dict[int, tuple[str, str]]
    """(rule, finding) of the pairs that broke a rule."""
    parts: dict[str, tuple[float, RobustScale, np.ndarray]]
    """Weight, scale and values [N] of each score: the terms of the importance."""
    importance: np.ndarray
    """[N]."""
    kept: np.ndarray
    """bool [N]."""
    method: str

    def of(self, places: Sequence[int] | np.ndarray) -> list[str]:
        """The reason of each of these pairs, with the lowest term of its importance; empty for a kept pair."""
        places = np.asarray(places)
        names = list(self.parts)
        weakest = np.argmin([weight * scale(values[places]) for weight, scale, values in self.parts.values()], axis=0)
        return [self._one(int(k), names[least]) for k, least in zip(places, weakest, strict=True)]

    def _one(self, place: int, least: str) -> str:
        if place in self.broken:
            rule, finding = self.broken[place]
            return f"{rule}: {finding}"
        if self.kept[place]:
            return ""
        return f"{self.method}: importance {self.importance[place]:.2f}, lowest term {least}"


@dataclass(frozen=True, slots=True)
class Filtered:
    """All pairs with the columns of the filter, [N] each; scores are NaN for pairs that broke a rule."""

    pairs: Dataset
    columns: dict[str, np.ndarray]
    """quality, diversity, importance, kept; doubtful with margins, ood with a reward model."""
    reasons: Reasons
    vectors: np.ndarray
    """Embeddings of the prompts, [N, D]."""
    summary: dict[str, Any]

    @property
    def kept(self) -> np.ndarray:
        """bool [N]."""
        return self.columns["kept"]


def write_tables(found: Filtered, output: Path) -> None:
    """Write the pairs with their new columns to ``kept.parquet`` and ``dropped.parquet``, a block of rows at a time."""
    with atomic_write(output / KEPT) as kept, atomic_write(output / DROPPED) as dropped:
        _write_rows(found, {True: kept, False: dropped})


def filtered_rows(found: Filtered) -> Iterator[tuple[bool, pa.Table]]:
    """(kept, pairs with the columns of the filter), of every block of rows once for the kept and once for the dropped
    pairs; dropped pairs have a ``reason``."""
    names = [name for name in (*found.columns, "reason") if name in found.pairs.column_names]
    pairs = found.pairs.remove_columns(names).with_format("arrow")
    for start in range(0, len(pairs), WRITTEN_ROWS):
        block = slice(start, min(start + WRITTEN_ROWS, len(pairs)))
        rows = pairs[block].replace_schema_metadata(None)
        for name, values in found.columns.items():
            rows = rows.append_column(name, pa.array(values[block], from_pandas=True))
        for kept in (True, False):
            places = np.flatnonzero(found.kept[block] == kept)
            part = rows.take(pa.array(places))
            if not kept:
                part = part.append_column("reason", pa.array(found.reasons.of(start + places), type=pa.string()))
            yield kept, part


def _write_rows(found: Filtered, targets: dict[bool, Path]) -> None:
    writers: dict[bool, pq.ParquetWriter] = {}
    for kept, part in filtered_rows(found):
        if kept not in writers:
            writers[kept] = pq.ParquetWriter(targets[kept], part.schema, compression="zstd")
        writers[kept].write_table(part, row_group_size=ROW_GROUP)
    for writer in writers.values():
        writer.close()


def write_broken(pairs: Dataset, broken: Mapping[int, tuple[str, str]], output: Path) -> None:
    """Write the pairs that broke a rule to ``dropped.parquet``, and remove an earlier filter's ``kept.parquet``."""
    output.mkdir(parents=True, exist_ok=True)
    (output / KEPT).unlink(missing_ok=True)
    places = sorted(broken)
    reasons = [f"{rule}: {finding}" for rule, finding in (broken[k] for k in places)]
    kept = [name for name in pairs.column_names if name != "reason"]
    rows = pairs.select_columns(kept).select(places).with_format("arrow")[:].replace_schema_metadata(None)
    with atomic_write(output / DROPPED) as target:
        write_parquet(rows.append_column("reason", pa.array(reasons, type=pa.string())), target)


def explain(output: Path, pair_id: str) -> dict[str, Any]:
    """All columns of one pair, with the reason if it was dropped.

    Raises:
        DataError: ``output`` is not a filter's folder, or it has no such pair.
    """
    if not (output / SUMMARY).exists():
        raise DataError(f"{output}: holds no {SUMMARY}", code="filter-missing", hint="run `align filter` first")
    for name in (KEPT, DROPPED):
        rows = Dataset(pq.read_table(output / name, partitioning=None, filters=[("id", "=", pair_id)])).to_list()
        if rows:
            row: dict[str, Any] = rows[0]
            return row
    raise DataError(f"{output}: no pair has id {pair_id!r}", code="filter-missing", hint="see the `id` column")
