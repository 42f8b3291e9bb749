"""What the page asks about a table: each function answers one address below /api/ with a JSON value."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from starlette.requests import Request

from align.errors import DataError
from align.viewer.answering import number
from align.viewer.export import write_checked
from align.viewer.neighbors import neighbors
from align.viewer.queues import is_fair, margin_column, source_column
from align.viewer.session import OpenTable, Session
from align.viewer.suggestions import first_columns, ready_filters, scatters
from align.viewer.tokens import measured_tokens
from align.viewer.views import MOST_ROWS, read_query

Handler = Callable[[OpenTable, Request, Any], Any]


def open_page(table: OpenTable, request: Request, body: Any) -> Any:
    """Everything that the page shows first."""
    session: Session = request.state.session
    numbers = table.table
    margin = margin_column(numbers)
    return {
        "tables": [one.name for one in session.tables],
        "runs": [str(folder) for folder in session.runs],
        "columns": [asdict(column) for column in numbers.columns.values()],
        "loaded": numbers.loaded,
        "count": numbers.count,
        "notes": [*numbers.notes, *table.notes],
        "who": table.file.who,
        "decisions": str(table.file.path),
        "cache": table.texts.state(),
        "can_decide": table.can_decide,
        "shown": first_columns(numbers),
        "scatters": scatters(numbers),
        "source": source_column(numbers),
        "ready": ready_filters(numbers),
        "measurements": numbers.measurements,
        "queues": ["random", *(["margin"] if margin else [])],
        "margin": {"column": margin, "fair": is_fair(numbers, margin)} if margin else None,
    }


def open_runs(session: Session) -> dict[str, Any]:
    """What the page shows first where no stage of the runs has written pairs yet."""
    return {
        "tables": [], "runs": [str(folder) for folder in session.runs], "columns": [], "loaded": [], "count": 0,
        "notes": ["no stage has written pairs yet"], "who": session.options.who, "decisions": None,
        "cache": {"state": "none", "done": 0, "of": 0, "why": "there is no table yet"}, "can_decide": False,
        "shown": [], "scatters": [], "source": None, "ready": [], "measurements": [], "queues": [], "margin": None,
    }  # fmt: skip


def view(table: OpenTable, request: Request, body: Any) -> Any:
    """Size, histograms and key of a view; with ``first`` also its first rows."""
    columns = body.get("columns") or []
    if not isinstance(columns, list):
        raise DataError("query: columns: expected a list", code="view-query")
    found = table.views.open(read_query(body.get("query"), table.table), columns)
    first = body.get("first")
    if first is None:
        return found
    if not isinstance(first, int) or not 0 <= first <= MOST_ROWS:
        raise DataError(f"first: found {str(first)[:40]}, expected 0 to {MOST_ROWS}", code="view-query")
    shown = table.views.rows(found["view"])[:first]
    return {**found, "page": _page(table, [int(row) for row in shown], texts=False)}


def rows(table: OpenTable, request: Request, body: Any) -> Any:
    """A range of the rows of a view."""
    given = request.query_params
    found = table.views.rows(given.get("view", ""))
    start = number(given.get("start"), len(found) + 1, "start")
    chosen = found[start : start + number(given.get("count"), MOST_ROWS + 1, "count")]
    return _page(table, [int(row) for row in chosen], texts=given.get("texts") != "0")


def cells(table: OpenTable, request: Request, body: Any) -> Any:
    """Any rows, by their numbers."""
    chosen, end = body.get("rows"), table.table.count
    good = isinstance(chosen, list) and len(chosen) <= MOST_ROWS
    if not good or not all(type(row) is int and 0 <= row < end for row in chosen):
        raise DataError(f"rows: expected at most {MOST_ROWS} numbers from 0 to {end - 1}", code="view-query")
    return _page(table, chosen, texts=bool(body.get("texts")))


def _page(table: OpenTable, chosen: Sequence[int], *, texts: bool) -> dict[str, Any]:
    found = table.views.cells(chosen)
    place = table.table.loaded.index("id")
    return {
        "rows": list(chosen),
        "cells": found,
        "texts": table.texts.beginnings(chosen) if texts else None,
        "decisions": [table.decision(row[place]) for row in found],
    }


def pair(table: OpenTable, request: Request, body: Any) -> Any:
    """One pair with all that is known about it."""
    return table.pair(_row(table, request))


def answers(table: OpenTable, request: Request, body: Any) -> Any:
    """The answers of the policies of all runs to the prompt of a pair."""
    session: Session = request.state.session
    return session.answers.of(table.texts.pair(_row(table, request))["plain"]["prompt"])


def copies(table: OpenTable, request: Request, body: Any) -> Any:
    """Rows with the same texts."""
    return table.texts.copies(_row(table, request))


def near(table: OpenTable, request: Request, body: Any) -> Any:
    """Rows with nearly the same prompt."""
    return neighbors(table.texts, _row(table, request))


def tokens(table: OpenTable, request: Request, body: Any) -> Any:
    """The tokens of a pair by their entanglement."""
    key = table.cell(_row(table, request), "id")
    return {"measured": measured_tokens(table.source.measured, key)}


def scatter(table: OpenTable, request: Request, body: Any) -> Any:
    """Numbers of rows in the cells of two columns."""
    return table.views.scatter(read_query(body.get("query"), table.table), body.get("x"), body.get("y"))


def decide(table: OpenTable, request: Request, body: Any) -> Any:
    """Write decisions; answered once they are on the disk."""
    requests = body.get("decisions")
    if not isinstance(requests, list) or not all(isinstance(one, dict) for one in requests):
        raise DataError("decide: expected a list of decisions", code="decision")
    made = table.decide(requests)
    return {"decisions": [{"id": one["id"], "pair": one["pair"], **table.decision(one["pair"])} for one in made]}


def state(table: OpenTable, request: Request, body: Any) -> Any:
    """What can change while nobody asks for it."""
    table.table.check_unchanged()
    return table.state()


def estimates(table: OpenTable, request: Request, body: Any) -> Any:
    """What the judged pairs say."""
    return table.estimates()


def conflicts(table: OpenTable, request: Request, body: Any) -> Any:
    """Pairs on which people disagree."""
    return table.conflicts()


def export(table: OpenTable, request: Request, body: Any) -> Any:
    """Write the judged pairs as a table for training."""
    if body.get("what") != "checked":
        raise DataError(f"export: found {str(body.get('what'))[:40]!r}, expected checked", code="view-query")
    return write_checked(table)


def _row(table: OpenTable, request: Request) -> int:
    return number(request.query_params.get("row"), table.table.count, "row")


ENDPOINTS: dict[str, tuple[str, Handler]] = {
    "open": ("GET", open_page), "view": ("POST", view), "rows": ("GET", rows), "cells": ("POST", cells),
    "pair": ("GET", pair), "answers": ("GET", answers), "copies": ("GET", copies), "neighbors": ("GET", near),
    "tokens": ("GET", tokens), "scatter": ("POST", scatter), "decide": ("POST", decide), "state": ("GET", state),
    "estimates": ("GET", estimates), "conflicts": ("GET", conflicts), "export": ("POST", export),
}  # fmt: skip
"""Address -> method and function."""
