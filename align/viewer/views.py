"""Queries of the page over a table: which rows pass, in which order, and what their columns look like."""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from align.errors import DataError
from align.viewer.table import MISSING, PairTable, binned, quoted

KEPT_VIEWS = 5
"""Row numbers of the last views stay in memory: 4 bytes per row and view."""
CELLS = 96
"""Cells of a scatter along each axis."""
MOST_ROWS = 400
Rows = np.ndarray


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition on a column."""

    column: str
    low: float | None = None
    high: float | None = None
    names: tuple[str, ...] | None = None
    missing: bool = False
    """The rows without a value."""

    def sql(self) -> tuple[str, list[Any]]:
        """The condition with its parameters."""
        found = quoted(self.column)
        if self.missing:
            return f"{found} is null", []
        if self.names is not None:
            marks = ", ".join("?" * len(self.names))
            return (f"{found}::varchar in ({marks})" if marks else "false"), list(self.names)
        parts = [(f"{found} >= ?", self.low), (f"{found} <= ?", self.high)]
        there = [(text, value) for text, value in parts if value is not None]
        return " and ".join(text for text, _ in there) or "true", [value for _, value in there]


@dataclass(frozen=True, slots=True)
class Query:
    """What the page asks for."""

    filters: tuple[Filter, ...] = ()
    sort: str | None = None
    descending: bool = False
    text: str = ""
    """Rows with this in one of their texts."""
    any_case: bool = False
    decided: bool | None = None
    queue: str | None = None
    """random or margin: the order of a queue in place of ``sort``."""


def read_query(given: Any, table: PairTable) -> Query:
    """A query as the page sends it; every name is checked against the table.

    Raises:
        DataError: it is not a query, or names a column that the table lacks.
    """
    if not isinstance(given, dict):
        raise _bad(f"found {type(given).__name__}, expected an object")
    filters = given.get("filters") or []
    if not isinstance(filters, list) or not all(isinstance(one, dict) for one in filters):
        raise _bad("filters: expected a list of objects")
    sort, text, decided, queue = (given.get(key) for key in ("sort", "text", "decided", "queue"))
    if sort is not None:
        _known(sort, table, None)
    if text is not None and not isinstance(text, str):
        raise _bad(f"text: found {text!r}, expected a string")
    if decided not in (None, True, False):
        raise _bad(f"decided: found {decided!r}, expected true or false")
    if queue not in (None, "random", "margin"):
        raise _bad(f"queue: found {queue!r}, expected random or margin")
    return Query(
        tuple(_filter(one, table) for one in filters), sort, bool(given.get("descending")), text or "",
        bool(given.get("any_case")), decided, queue,
    )  # fmt: skip


class Views:
    """The views of one table.

    Args:
        table: its numbers.
        search: (text, any case) -> ascending numbers of the rows that contain it.
        decided: ids of the pairs that have a decision.
        queue: name of a queue -> all row numbers in its order.
    """

    def __init__(
        self,
        table: PairTable,
        search: Callable[[str, bool], Rows],
        decided: Callable[[], Sequence[str]],
        queue: Callable[[str], Rows],
    ) -> None:
        self.table, self._search, self._decided, self._queue = table, search, decided, queue
        self._kept: OrderedDict[str, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, query: Query, columns: Sequence[str]) -> dict[str, Any]:
        """Key and size of the view of a query, and the histogram of each column without the column's own filter."""
        for name in columns:
            _known(name, self.table, "number")
        hits = self._search(query.text, query.any_case) if query.text else None
        ordered = None if query.queue is None else self._queue(query.queue)
        with self.table.query() as cursor:
            extra = self._extra(cursor, query, hits)
            rows = self._rows(cursor, query, extra, ordered)
            counts = self._histograms(cursor, query, extra, columns)
        key = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
        with self._lock:
            self._kept[key] = rows
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT_VIEWS:
                self._kept.popitem(last=False)
        return {"view": key, "count": len(rows), "of": self.table.count, "histograms": counts}

    def rows(self, key: str) -> Rows:
        """The row numbers of a view, in its order.

        Raises:
            DataError: the view is no longer kept.
        """
        with self._lock:
            if key not in self._kept:
                raise DataError("view: it is no longer kept", code="view-gone", hint="the page opens it again")
            self._kept.move_to_end(key)
            return self._kept[key]

    def cells(self, rows: Sequence[int]) -> list[list[Any]]:
        """The loaded columns of these rows, in the order given."""
        names = ", ".join(quoted(name) for name in self.table.loaded)
        with self.table.query() as cursor:
            found = cursor.execute(
                f"select p.rowid, {names} from (select unnest(?) as n) h join pairs p on p.rowid = h.n", [list(rows)]
            ).fetchall()
        known = {row[0]: [_json(value) for value in row[1:]] for row in found}
        return [known[int(row)] for row in rows]

    def scatter(self, query: Query, x: str, y: str) -> dict[str, Any]:
        """Numbers of the rows of a query in ``CELLS`` x ``CELLS`` cells of two columns, those within both axes.

        ``cells`` holds [column, row from below, count]; ``outside`` counts rows beyond an axis or without a value.
        """
        for name in (x, y):
            _known(name, self.table, "number")
        hits = self._search(query.text, query.any_case) if query.text else None
        inside, params = [], []
        for name in (x, y):
            column = self.table.columns[name]
            inside.append(f"least({CELLS - 1}, floor(({quoted(name)} - ?) / ? * {CELLS}))::integer")
            params += [column.low, column.high - column.low]
        limits = " and ".join(f"{quoted(name)} between ? and ?" for name in (x, y))
        ends = [end for name in (x, y) for end in (self.table.columns[name].low, self.table.columns[name].high)]
        with self.table.query() as cursor:
            condition, values = _where(query, self._extra(cursor, query, hits))
            cells = cursor.execute(
                f"select {inside[0]} as a, {inside[1]} as b, count(*) from pairs where {condition} and {limits} "
                "group by 1, 2",
                [*params, *values, *ends],
            ).fetchall()
            whole = cursor.execute(f"select count(*) from pairs where {condition}", values).fetchone()
        assert whole is not None
        return {"cells": cells, "size": CELLS, "outside": whole[0] - sum(count for *_, count in cells)}

    def passing(self, query: Query) -> np.ndarray:
        """Whether each row passes the query without its text, bool [N]."""
        found = np.zeros(self.table.count, dtype=bool)
        with self.table.query() as cursor:
            found[self._rows(cursor, query, self._extra(cursor, query, None), None)] = True
        return found

    def _rows(self, cursor: duckdb.DuckDBPyConnection, query: Query, extra: list[str], ordered: Rows | None) -> Rows:
        """The rows of a query in its order; of a queue, the order is ``ordered``."""
        condition, values = _where(query, extra)
        order = "rowid"
        if query.sort is not None and ordered is None:
            order = f"{quoted(query.sort)} {'desc' if query.descending else 'asc'} nulls last, rowid"
        found = cursor.execute(f"select rowid::integer as n from pairs where {condition} order by {order}", values)
        rows = np.asarray(found.fetchnumpy()["n"], dtype=np.int32)
        if ordered is None:
            return rows
        passing = np.zeros(self.table.count, dtype=bool)
        passing[rows] = True
        return np.asarray(ordered[passing[ordered]], dtype=np.int32)

    def _extra(self, cursor: duckdb.DuckDBPyConnection, query: Query, hits: Rows | None) -> list[str]:
        """Conditions of a search and of decisions, over tables that this cursor knows."""
        found = []
        if hits is not None:
            cursor.register("hits", pa.table({"n": pa.array(hits)}))
            found.append("rowid in (select n from hits)")
        if query.decided is not None:
            cursor.register("decided", pa.table({"n": pa.array(list(self._decided()), pa.string())}))
            found.append(f'"id" {"in" if query.decided else "not in"} (select n from decided)')
        return found

    def _histograms(
        self, cursor: duckdb.DuckDBPyConnection, query: Query, extra: list[str], columns: Sequence[str]
    ) -> dict[str, list[int]]:
        filtered = {one.column for one in query.filters}
        together = [name for name in columns if name not in filtered]
        counts = self._counts(cursor, together, *_where(query, extra))
        for name in columns:
            if name in filtered:
                counts |= self._counts(cursor, [name], *_where(query, extra, without=name))
        return counts

    def _counts(
        self, cursor: duckdb.DuckDBPyConnection, names: Sequence[str], condition: str, values: list[Any]
    ) -> dict[str, list[int]]:
        """Column -> rows below its axis, in each bin, above it, and without a value."""
        if not names:
            return {}
        sets = ", ".join(f"({binned(name)})" for name in names)
        bins = ", ".join(binned(name) for name in names)
        rows = cursor.execute(
            f"select grouping_id({bins}), {bins}, count(*) from pairs where {condition} "
            f"group by grouping sets ({sets})",
            values,
        ).fetchall()
        counts = {name: [0] * (self.table.columns[name].bins + 3) for name in names}
        everything = 2 ** len(names) - 1
        for group, *cells, count in rows:
            place = len(names) - 1 - int(math.log2(everything - group))
            bin_ = cells[place]
            counts[names[place]][-1 if bin_ == MISSING else bin_] += count
        return counts


def _where(query: Query, extra: Sequence[str], without: str | None = None) -> tuple[str, list[Any]]:
    parts = [one.sql() for one in query.filters if one.column != without]
    return " and ".join([*(f"({text})" for text, _ in parts), *extra]) or "true", [v for _, vs in parts for v in vs]


def _filter(given: Mapping[str, Any], table: PairTable) -> Filter:
    name = given.get("column")
    kind = _known(name, table, None)
    assert isinstance(name, str)
    names = given.get("names")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise _bad(f"{name}: names: expected a list of strings")
        return Filter(name, names=tuple(names))
    if given.get("missing"):
        return Filter(name, missing=True)
    if kind != "number":
        raise _bad(f"{name}: expected names of a column of kind {kind}")
    ends = [given.get(end) for end in ("low", "high")]
    for end in ends:
        if end is not None and (isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end)):
            raise _bad(f"{name}: found {end!r}, expected a finite number")
    return Filter(name, low=ends[0], high=ends[1])


def _known(name: Any, table: PairTable, kind: str | None) -> str:
    """Kind of a loaded column.

    Raises:
        DataError: there is none of this name, or it is of another kind.
    """
    if not isinstance(name, str) or name not in table.columns or name not in table.loaded:
        raise _bad(f"found column {str(name)[:80]!r}, expected one of {', '.join(table.loaded)}")
    found = table.columns[name].kind
    if kind is not None and found != kind:
        raise _bad(f"{name}: a column of kind {found}, expected {kind}")
    return found


def _json(value: Any) -> Any:
    """A cell for JSON, which has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _bad(text: str) -> DataError:
    return DataError(f"query: {text}", code="view-query", hint="reload the page")


def count_rows(table: PairTable, query: Query) -> int:
    """Number of the rows that pass the filters of a query."""
    condition, values = _where(query, ())
    with table.query() as cursor:
        found = cursor.execute(f"select count(*) from pairs where {condition}", values).fetchone()
    return int(found[0]) if found is not None else 0
