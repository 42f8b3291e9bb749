"""What a filter found, and the tables that it is written into."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from align.errors import DataError
from align.filtering.selection import Scale
from align.io.files import atomic_write

KEPT, DROPPED, SUMMARY = "kept.parquet", "dropped.parquet", "filter.json"
WRITTEN_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why pairs were dropped, in words that are made when they are asked for."""

    broken: dict[int, tuple[str, str]]
    """(rule, what was found) of the pairs that broke one."""
    parts: dict[str, tuple[float, Scale, np.ndarray]]
    """Of each score its weight, its scale and its values [N]: what importance is made of."""
    importance: np.ndarray
    """[N]."""
    kept: np.ndarray
    """bool [N]."""
    method: str

    def of(self, places: Sequence[int] | np.ndarray) -> list[str]:
        """The reason of each of these pairs, with the least of the parts of its importance; empty where it was kept."""
        places = np.asarray(places)
        names = list(self.parts)
        weakest = np.argmin([weight * scale(values[places]) for weight, scale, values in self.parts.values()], axis=0)
        return [self._one(int(k), names[least]) for k, least in zip(places, weakest, strict=True)]

    def _one(self, place: int, least: str) -> str:
        if place in self.broken:
            rule, said = self.broken[place]
            return f"{rule}: {said}"
        if self.kept[place]:
            return ""
        return f"{self.method}: importance {self.importance[place]:.2f}, least from {least}"


@dataclass(frozen=True, slots=True)
class Filtered:
    """All pairs with what the filter found, [N] each; scores are not-a-number where a rule came first."""

    pairs: Dataset
    columns: dict[str, np.ndarray]
    """quality, diversity, importance, kept and, where there is what they need, doubtful and ood."""
    reasons: Reasons
    vectors: np.ndarray
    """[N, D]."""
    summary: dict[str, Any]

    @property
    def kept(self) -> np.ndarray:
        """bool [N]."""
        return self.columns["kept"]


def write_tables(found: Filtered, output: Path) -> None:
    """The pairs with their new columns as ``kept.parquet`` and ``dropped.parquet``, a block of rows at a time."""
    with atomic_write(output / KEPT) as kept, atomic_write(output / DROPPED) as dropped:
        _write_rows(found, {True: kept, False: dropped})


def _write_rows(found: Filtered, targets: dict[bool, Path]) -> None:
    names = [name for name in (*found.columns, "reason") if name in found.pairs.column_names]
    pairs = found.pairs.remove_columns(names).with_format("arrow")
    writers: dict[bool, pq.ParquetWriter] = {}
    for start in range(0, len(pairs), WRITTEN_ROWS):
        block = slice(start, min(start + WRITTEN_ROWS, len(pairs)))
        rows = pairs[block].replace_schema_metadata(None)
        for name, values in found.columns.items():
            rows = rows.append_column(name, pa.array(values[block], from_pandas=True))
        for wanted, target in targets.items():
            places = np.flatnonzero(found.kept[block] == wanted)
            part = rows.take(pa.array(places))
            if not wanted:
                part = part.append_column("reason", pa.array(found.reasons.of(start + places), type=pa.string()))
            if wanted not in writers:
                writers[wanted] = pq.ParquetWriter(target, part.schema, compression="zstd")
            writers[wanted].write_table(part)
    for writer in writers.values():
        writer.close()


def explain(output: Path, pair_id: str) -> dict[str, Any]:
    """Everything the filter found about one pair.

    Raises:
        DataError: nothing was filtered into ``output``, or it has no such pair.
    """
    if not (output / SUMMARY).exists():
        raise DataError(f"{output}: holds no {SUMMARY}", code="filter-missing", hint="run `align filter` first")
    for name in (KEPT, DROPPED):
        rows = pq.read_table(output / name, partitioning=None, filters=[("id", "=", pair_id)]).to_pylist()
        if rows:
            found: dict[str, Any] = rows[0]
            return found
    raise DataError(f"{output}: no pair has id {pair_id!r}", code="filter-missing", hint="ids stand in the `id` column")
