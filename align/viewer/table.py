"""The numbers and short names of a pair table in a locked database in memory; its texts stay in their files."""

import glob
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from align.config.columns import COLUMNS, TEXT
from align.errors import DataError
from align.viewer.measured import Measured, meaning, without_clashes
from align.viewer.sources import SourceTable, stamp

BINS = 60
MISSING = 255
"""Bin of a row without a value. Bin 0 is below the axis, the one after the last above it."""
LONGEST = 200
"""Characters of a name; a column with longer ones is shown with its pair and cannot be filtered."""
MOST_NAMES = 200
"""Different names of a column that can be filtered by choosing some of them."""
SHORT_BYTES = 256
"""Bytes per row in its file up to which a column of strings is read at the start."""
TAILS = 0.001
STRETCH = 3.0
"""An axis ends at the 0.1% quantiles if the whole range is this many times wider; what lies outside is counted."""
EXACT = 2**53
"""Largest integer up to which a double holds every one."""
AT_ONCE = 2
SETTINGS: dict[str, Any] = {
    "autoinstall_known_extensions": False, "autoload_known_extensions": False, "memory_limit": "500MB", "threads": 2,
}  # fmt: skip
MEANINGS = {column.name: column.meaning for column in COLUMNS}


@dataclass(slots=True)
class ColumnFacts:
    """One column as the page shows it."""

    name: str
    kind: str
    """number, flag, name (a string that can be filtered), id, text (one of the three), or long (only with the pair)."""
    meaning: str = ""
    low: float = 0.0
    high: float = 1.0
    """Ends of the axis."""
    minimum: float | None = None
    maximum: float | None = None
    bins: int = BINS
    missing: int = 0
    values: list[tuple[str, int]] = field(default_factory=list)
    """(name, rows) of a column of names, the most frequent first."""


def quoted(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def binned(name: str) -> str:
    """The column of bins of a column, as an SQL identifier."""
    return quoted(f"\x1fbin of {name}")


class PairTable:
    """A pair table whose numbers, flags and short names are in memory; ``rowid`` is the number of the row, from 0.

    Args:
        source: the files.
        scratch: folder for what does not fit into the memory.

    Raises:
        DataError: a file cannot be read, or has no row.
    """

    def __init__(self, source: SourceTable, scratch: Path) -> None:
        self.source = source
        self.stamp = stamp(source.watched)
        self.columns: dict[str, ColumnFacts] = {}
        self.notes = list(source.notes)
        self.measurements: list[str] = []
        """Names of the files whose columns were joined."""
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._database = duckdb.connect(config=SETTINGS | {"temp_directory": str(scratch / "spilled")})
        try:
            self._load()
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"{source.name}: cannot be read ({first})", code="data-unreadable") from None
        self._database.execute("set enable_external_access = false")
        self._database.execute("set lock_configuration = true")
        self._notes()

    @property
    def loaded(self) -> list[str]:
        """Columns that are in memory, in the order of the table."""
        return [name for name, column in self.columns.items() if column.kind not in ("text", "long")]

    def numbers(self) -> list[str]:
        """Columns that have a histogram."""
        return [name for name, column in self.columns.items() if column.kind == "number"]

    @contextmanager
    def query(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor of its own; at most ``AT_ONCE`` queries run together.

        Raises:
            DataError: the file has changed since it was opened.
        """
        self.check_unchanged()
        with self._turns, self._database.cursor() as cursor:
            yield cursor

    def ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Column -> share of the rows with a value that lie below this one; those equal to it count half."""
        if not values:
            return {}
        parts = ", ".join(
            f"(count(*) filter ({found} < ?) + 0.5 * count(*) filter ({found} = ?)) / count({found})"
            for found in map(quoted, values)
        )
        with self.query() as cursor:
            found = cursor.execute(
                f"select {parts} from pairs", [value for value in values.values() for _ in range(2)]
            ).fetchone()
        return {} if found is None else dict(zip(values, found, strict=True))

    def is_unchanged(self) -> bool:
        """Whether no file of the table was written, replaced or removed since it was opened."""
        return stamp(self.source.watched) == self.stamp

    def check_unchanged(self) -> None:
        """Raise a DataError if a file of the table has changed since it was opened."""
        if not self.is_unchanged():
            raise DataError(
                f"{self.source.name}: the file has changed since it was opened",
                code="table-changed",
                hint="reload the table on the page; decisions are saved and stay",
            )

    def close(self) -> None:
        """Free the memory."""
        self._database.close()

    def _load(self) -> None:
        kinds: dict[str, str] = {}
        for file in self.source.files:
            for name, kind in _kinds(pq.ParquetFile(file)).items():
                kinds[name] = kind if kinds.get(name, kind) == kind else "long"
        for name, count in Counter(name.lower() for name in (*kinds, "rowid")).items():
            kinds |= {one: "long" for one in kinds if count > 1 and one.lower() == name and one not in ("id", *TEXT)}
        short = {name: kind for name, kind in kinds.items() if kind not in ("text", "long")}
        declared = ", ".join(f"{quoted(name)} {SQL_TYPES[kind]}" for name, kind in short.items())
        self._database.execute(f"create table base ({declared})")
        for file in self.source.files:
            there = set(pq.read_schema(file).names)
            chosen = ", ".join(_cast(name, kind) for name, kind in short.items() if name in there)
            self._database.execute(
                f"insert into base by name select {chosen} from read_parquet(?, hive_partitioning = false)",
                [glob.escape(str(file))],
            )
        (self.count,) = self._one("select count(*) from base")
        if self.count == 0:
            raise DataError(f"{self.source.name}: holds no rows", code="data-empty", hint="expected one pair per row")
        for other in without_clashes(self.source.measured, list(kinds)):
            try:
                kinds |= self._join(other)
            except (duckdb.Error, OSError, pa.ArrowException) as error:
                self.notes.append(f"{other.name}: cannot be read ({str(error).splitlines()[0]})")
        for name, kind in kinds.items():
            self.columns[name] = self._facts(name, kind)
        bins = [
            f"{_bin(column)} as {binned(column.name)}" for column in self.columns.values() if column.kind == "number"
        ]
        shown = [*map(quoted, self.loaded), *bins]
        self._database.execute(f"create table pairs as select {', '.join(shown)} from base")
        self._database.execute("drop table base")

    def _join(self, one: Measured) -> dict[str, str]:
        """Add the columns of a file to the rows with the same ids; column -> kind of those added."""
        kinds = _kinds(pq.ParquetFile(one.file))
        columns = {
            source: name for source, name in one.columns.items() if kinds.get(source) in ("number", "flag", "name")
        }
        chosen = ", ".join(f"{_cast(source, kinds[source], name)}" for source, name in columns.items())
        self._database.execute(
            f'create temp table other as select "id"::varchar as "\x1fid", {chosen} '
            "from read_parquet(?, hive_partitioning = false)",
            [glob.escape(str(one.file))],
        )
        matched, ids, rows = self._one(
            'select (select count(*) from base where "id" in (select "\x1fid" from other)), '
            'count(distinct "\x1fid"), count(*) from other'
        )
        if ids < rows:
            self.notes.append(f"{one.name}: not shown, for it names some pairs twice")
        if matched and ids == rows:
            self._database.execute(
                f"create table joined as select b.*, {', '.join(f'o.{quoted(name)}' for name in columns.values())} "
                'from base b left join other o on b."id" = o."\x1fid" order by b.rowid'
            )
            self._database.execute("drop table base")
            self._database.execute("alter table joined rename to base")
            self.measurements.append(one.name)
        self._database.execute("drop table other")
        return {name: kinds[source] for source, name in columns.items()} if matched and ids == rows else {}

    def _facts(self, name: str, kind: str) -> ColumnFacts:
        column, found = ColumnFacts(name, kind, MEANINGS.get(name) or meaning(name)), quoted(name)
        if kind in ("text", "long"):
            return column
        (column.missing,) = self._one(f"select count(*) - count({found}) from base")
        if kind == "number":
            self._axis(column)
        elif kind in ("name", "flag"):
            (longest,) = self._one(f"select max(length({found}::varchar)) from base")
            if longest is not None and longest >= LONGEST:
                column.kind = "long"
                return column
            rows = self._database.execute(
                f"select {found}::varchar, count(*) from base where {found} is not null group by 1 "
                f"order by 2 desc, 1 limit {MOST_NAMES + 1}"
            ).fetchall()
            column.values = rows if len(rows) <= MOST_NAMES else []
        return column

    def _axis(self, column: ColumnFacts) -> None:
        found = quoted(column.name)
        low, high, tails, whole = self._one(
            f"select min({found}), max({found}), quantile_cont({found}, [{TAILS}, {1 - TAILS}]), "
            f"bool_and({found} = floor({found})) from base where isfinite({found})"
        )
        if low is None:
            return
        column.minimum, column.maximum = low, high
        if whole and high - low < BINS:
            column.bins = int(high - low) + 1
            column.low, column.high = low - 0.5, high + 0.5
            return
        if high - low > STRETCH * (tails[1] - tails[0]) > 0:
            low, high = tails
        column.low, column.high = (low, high) if high > low else (low - 0.5, low + 0.5)

    def _notes(self) -> None:
        (different,) = self._one('select count(distinct "id") from pairs')
        self.unique_ids = different == self.count
        if not self.unique_ids:
            self.notes.append(
                f"{self.count - different} rows have no id, or one that another row has too: decisions are refused"
            )
        if "margin" not in self.columns:
            self.notes.append(
                "no column `margin`: order and queue by margin, and the reward model's accuracy, are not there; "
                "`align reward score` adds it"
            )

    def _one(self, query: str) -> Sequence[Any]:
        found = self._database.execute(query).fetchone()
        assert found is not None
        return found


SQL_TYPES = {"number": "double", "flag": "boolean", "name": "varchar", "id": "varchar"}


def _cast(name: str, kind: str, called: str | None = None) -> str:
    found, target = quoted(name), quoted(called or name)
    if kind == "number":
        return f"case when isnan({found}::double) then null else {found}::double end as {target}"
    if kind == "name":
        return f"left({found}::varchar, {LONGEST}) as {target}"
    return f"{found}::{SQL_TYPES[kind]} as {target}"


def _bin(column: ColumnFacts) -> str:
    found, width = quoted(column.name), (column.high - column.low) / column.bins
    return (
        f"cast(case when {found} is null then {MISSING} when {found} < {column.low!r} then 0 when {found} > "
        f"{column.high!r} then {column.bins + 1} else least({column.bins}, 1 + floor(({found} - {column.low!r}) / "
        f"{width!r})) end as utinyint)"
    )


def _kinds(file: pq.ParquetFile) -> dict[str, str]:
    """Column -> kind, of one file."""
    sizes: dict[str, int] = {}
    for group in range(file.metadata.num_row_groups):
        part = file.metadata.row_group(group)
        for index in range(part.num_columns):
            inner = part.column(index)
            sizes[inner.path_in_schema] = sizes.get(inner.path_in_schema, 0) + inner.total_uncompressed_size
    rows = max(1, file.metadata.num_rows)
    large = _inexact(file)
    return {
        one.name: "name" if one.name in large else _kind(one.name, one.type, sizes.get(one.name, 0) / rows)
        for one in file.schema_arrow
    }


def _inexact(file: pq.ParquetFile) -> set[str]:
    """Columns with integers that a double does not hold, such as identifiers of 64 bits; they are names."""
    found = set()
    for group in range(file.metadata.num_row_groups):
        part = file.metadata.row_group(group)
        for index in range(part.num_columns):
            inner = part.column(index)
            limits = inner.statistics
            ends = (limits.min, limits.max) if limits is not None and limits.has_min_max else ()
            if any(isinstance(end, int) and abs(end) > EXACT for end in ends):
                found.add(inner.path_in_schema)
    return found - {"id", *TEXT}


def _kind(name: str, kind: pa.DataType, size: float) -> str:
    if name in TEXT:
        return "text"
    if name == "id":
        return "id"
    if pa.types.is_boolean(kind):
        return "flag"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    plain = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    short = plain and size <= SHORT_BYTES
    return "name" if short or pa.types.is_temporal(kind) or pa.types.is_null(kind) else "long"
