"""The server of `align view`: 127.0.0.1 alone, a token for every answer with data, no request to anywhere else."""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from align.errors import AlignError, DataError
from align.viewer.followed import follow, report_file
from align.viewer.session import OpenTable, Session
from align.viewer.views import MOST_ROWS, read_query

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
FILES = {str(file.relative_to(STATIC)): file for file in STATIC.rglob("*") if file.is_file() and file.suffix in TYPES}
"""Files of the page by their path below the address; nothing else is served."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types default"
)
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""Of a run's report, which the page shows in a frame: it reaches neither the page nor the network."""
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}  # fmt: skip
STATUS = {
    "view-token": 401, "view-host": 421, "table-changed": 409, "decision-stale": 409, "view-gone": 410,
    "disk-full": 507, "output-folder": 507, "view-query": 400, "decision": 400,
}  # fmt: skip
LARGEST_BODY = 8_000_000
TICKET_SECONDS = 60.0
Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Handler = Callable[[OpenTable, Request, Any], Any]


class Guard:
    """Refuses foreign hosts and requests without the token, and adds the policy to every answer.

    Args:
        app: what answers.
        token: what the header ``x-token`` of every request for data must be.
        hosts: the names under which the server may be asked (a page elsewhere that resolves to 127.0.0.1 may not).
    """

    def __init__(self, app: Any, token: str, hosts: frozenset[str]) -> None:
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Messages, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                extra = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in names
                ]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(scope["path"], headers)
        if problem is not None:
            await failure(problem)(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)

    def _problem(self, path: str, headers: dict[bytes, str]) -> AlignError | None:
        if headers.get(b"host", "") not in self.hosts:
            return DataError("this server answers to 127.0.0.1 alone", code="view-host")
        given = headers.get(b"x-token", "")
        if path.startswith("/api/") and not secrets.compare_digest(given.encode(), self.token.encode()):
            return DataError(
                "the token is not that of this server",
                code="view-token",
                hint="open the address that `align view` printed when it was started",
            )
        return None


def failure(error: AlignError) -> JSONResponse:
    """An error as the page shows it."""
    body = {"code": error.code, "message": error.message, "hint": error.hint}
    return JSONResponse({"error": body}, status_code=STATUS.get(error.code, 422))


def make_app(session: Session, token: str, port: int) -> Guard:
    """The application.

    Args:
        session: what is open.
        token: see ``Guard``.
        port: of the server.
    """
    tickets: dict[str, tuple[Path, float]] = {}

    def ticket(request: Request) -> Response:
        """An address for the report of a run, for one minute."""
        file = report_file(session.runs[_number(request.query_params.get("run"), len(session.runs), "run")])
        if file is None:
            return JSONResponse({"address": None})
        key = secrets.token_urlsafe(24)
        tickets[key] = (file, time.monotonic() + TICKET_SECONDS)
        return JSONResponse({"address": f"/report/{key}"})

    def report(request: Request) -> Response:
        file, until = tickets.get(request.path_params["ticket"], (None, 0.0))
        if file is None or time.monotonic() > until:
            return Response("this address is over; open the report from the page", status_code=404)
        return HTMLResponse(file.read_text(encoding="utf-8"), headers={"content-security-policy": REPORT_POLICY})

    def run(request: Request) -> Response:
        number = _number(request.query_params.get("run"), len(session.runs), "run")
        return JSONResponse(follow(session.runs[number]))

    def reopen(request: Request) -> Response:
        session.reopen(_number(request.query_params.get("table"), len(session.tables), "table"))
        return JSONResponse({})

    routes = [
        Route("/", _static("index.html")),
        *(Route(f"/{name}", _static(name)) for name in FILES),
        *(
            Route(f"/api/{name}", _endpoint(session, work), methods=[method])
            for name, (method, work) in ENDPOINTS.items()
        ),
        Route("/api/run", _guarded(run)),
        Route("/api/ticket", _guarded(ticket), methods=["POST"]),
        Route("/api/reopen", _guarded(reopen), methods=["POST"]),
        Route("/report/{ticket}", report),
    ]
    hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}"})
    return Guard(Starlette(routes=routes), token, hosts)


def _open(table: OpenTable, request: Request, body: Any) -> Any:
    table.table.check_unchanged()
    session: Session = request.state.session
    return {
        "tables": [one.name for one in session.tables],
        "runs": [str(folder) for folder in session.runs],
        "columns": [asdict(column) for column in table.table.columns.values()],
        "loaded": table.table.loaded,
        "count": table.table.count,
        "notes": table.table.notes,
        "who": table.file.who,
        "decisions": str(table.file.path),
        "cache": table.texts.state(),
        "can_decide": table.table.unique_ids,
    }


def _view(table: OpenTable, request: Request, body: Any) -> Any:
    columns = body.get("columns") or []
    if not isinstance(columns, list):
        raise DataError("query: columns: expected a list", code="view-query")
    return table.views.open(read_query(body.get("query"), table.table), columns)


def _rows(table: OpenTable, request: Request, body: Any) -> Any:
    rows = table.views.rows(request.query_params.get("view", ""))
    start = _number(request.query_params.get("start"), len(rows) + 1, "start")
    chosen = rows[start : start + MOST_ROWS][: _number(request.query_params.get("count"), MOST_ROWS + 1, "count")]
    numbers = [int(row) for row in chosen]
    cells = table.views.cells(numbers)
    place = table.table.loaded.index("id")
    return {
        "rows": numbers,
        "cells": cells,
        "texts": table.texts.beginnings(numbers),
        "decisions": [table.decision(row[place]) for row in cells],
    }


def _pair(table: OpenTable, request: Request, body: Any) -> Any:
    return table.pair(_number(request.query_params.get("row"), table.table.count, "row"))


def _copies(table: OpenTable, request: Request, body: Any) -> Any:
    return table.texts.copies(_number(request.query_params.get("row"), table.table.count, "row"))


def _scatter(table: OpenTable, request: Request, body: Any) -> Any:
    return table.views.scatter(read_query(body.get("query"), table.table), body.get("x"), body.get("y"))


def _decide(table: OpenTable, request: Request, body: Any) -> Any:
    requests = body.get("decisions")
    if not isinstance(requests, list) or not all(isinstance(one, dict) for one in requests):
        raise DataError("decide: expected a list of decisions", code="decision")
    made = table.decide(requests)
    return {"decisions": [{"id": one["id"], "pair": one["pair"], **table.decision(one["pair"])} for one in made]}


def _state(table: OpenTable, request: Request, body: Any) -> Any:
    table.table.check_unchanged()
    ledger = table.file.refresh()
    return {"cache": table.texts.state(), "decisions": len(ledger.decisions), "broken": ledger.broken}


def _estimates(table: OpenTable, request: Request, body: Any) -> Any:
    return table.estimates()


def _conflicts(table: OpenTable, request: Request, body: Any) -> Any:
    return table.conflicts()


ENDPOINTS: dict[str, tuple[str, Handler]] = {
    "open": ("GET", _open), "view": ("POST", _view), "rows": ("GET", _rows), "pair": ("GET", _pair),
    "copies": ("GET", _copies), "scatter": ("POST", _scatter), "decide": ("POST", _decide), "state": ("GET", _state),
    "estimates": ("GET", _estimates), "conflicts": ("GET", _conflicts),
}  # fmt: skip


def _endpoint(session: Session, work: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            body = await _body(request) if request.method == "POST" else None
            request.state.session = session

            def job() -> Any:
                table = session.table(_number(request.query_params.get("table", "0"), len(session.tables), "table"))
                return work(table, request, body)

            return JSONResponse(await run_in_threadpool(job))
        except AlignError as error:
            return failure(error)

    return answer


def _guarded(work: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await run_in_threadpool(work, request)
        except AlignError as error:
            return failure(error)

    return answer


def _static(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return FileResponse(FILES[name], media_type=TYPES[FILES[name].suffix])

    return answer


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent.

    Raises:
        DataError: it is none, or too large.
    """
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_BODY:
            raise DataError(f"request: more than {LARGEST_BODY} bytes", code="view-query")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError("request: expected a JSON object", code="view-query", hint="reload the page")
    return found


def _number(given: str | None, end: int, what: str) -> int:
    """An integer from 0 to below ``end``.

    Raises:
        DataError: it is none.
    """
    if given is not None and given.isascii() and given.isdigit() and len(given) < 12 and int(given) < end:
        return int(given)
    raise DataError(f"{what}: found {str(given)[:40]!r}, expected 0 to {end - 1}", code="view-query", hint="reload")
