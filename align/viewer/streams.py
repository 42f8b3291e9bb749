"""Answers of the server that go on: hits of a search as they are found, and events of tables and runs."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from align.errors import DataError
from align.viewer.answering import FAILURES, Answer, as_failure, as_json, error_body, failure, number, read_body
from align.viewer.followed import follow
from align.viewer.session import OpenTable, Session
from align.viewer.views import Query, read_query

MOST_HITS = 1000
"""Rows that a stream of hits names; the view of the same search has all of them."""
EVERY, ALIVE = 1.0, 15.0
"""Seconds between two looks, and between two signs of life."""
RUN_EVERY = 3.0


class Searches:
    """The running search of each tab; a newer one of the same tab ends it."""

    def __init__(self) -> None:
        self._running: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, tab: str) -> threading.Event:
        """End the tab's search, and return what tells the next one to end."""
        ended = threading.Event()
        with self._lock:
            earlier = self._running.get(tab)
            self._running[tab] = ended
        if earlier is not None:
            earlier.set()
        return ended

    def end(self, tab: str, own: threading.Event) -> None:
        """Forget a search that has ended."""
        with self._lock:
            if self._running.get(tab) is own:
                del self._running[tab]


def search_endpoint(session: Session) -> Answer:
    """POST /api/search: hits as lines of JSON."""
    searches = Searches()

    async def answer(request: Request) -> Response:
        try:
            body = await read_body(request)
            table = await run_in_threadpool(session.asked, request.query_params.get("table", "0"))
            query = read_query(body.get("query"), table.table)
            if not query.text:
                raise DataError("search: found no text", code="view-query", hint="type what you look for")
        except FAILURES as error:
            return failure(as_failure(error))
        lines = _hits(table, query, searches, str(body.get("tab"))[:64])
        return StreamingResponse(iterate_in_threadpool(lines), media_type="application/x-ndjson")

    return answer


def _hits(table: OpenTable, query: Query, searches: Searches, tab: str) -> Iterator[bytes]:
    ended, count, named = searches.begin(tab), 0, 0
    try:
        passing = table.views.passing(query)
        for done, block in table.texts.hits(query.text, query.any_case):
            if ended.is_set():
                yield _line({"cancelled": True})
                return
            rows = block[passing[block]]
            shown = rows[: MOST_HITS - named]
            count, named = count + len(rows), named + len(shown)
            yield _line({"done": done, "of": table.table.count, "hits": count, "rows": shown.tolist()})
        yield _line({"end": True, "hits": count})
    except FAILURES as error:
        yield _line(error_body(as_failure(error)))
    finally:
        searches.end(tab, ended)


def events_endpoint(session: Session) -> Answer:
    """GET /api/events: what changed, as server-sent events."""

    async def answer(request: Request) -> Response:
        try:
            given = request.query_params.get("runs", "")
            runs = [number(one, len(session.runs), "runs") for one in given.split(",") if one]
            tables = request.query_params.get("table")
            table = None if tables is None else await run_in_threadpool(session.asked, tables)
        except FAILURES as error:
            return failure(as_failure(error))
        return StreamingResponse(_events(session, table, runs, request), media_type="text/event-stream")

    return answer


async def _events(session: Session, table: OpenTable | None, runs: list[int], request: Request) -> AsyncIterator[bytes]:
    sent: dict[str, bytes] = {}
    spoken = looked = -ALIVE
    while not await request.is_disconnected():
        now = time.monotonic()
        found: dict[str, tuple[str, Any]] = {}
        if table is not None:
            found["state"] = ("state", await run_in_threadpool(table.state))
        if now - looked >= RUN_EVERY:
            looked = now
            for run in runs:
                state = await run_in_threadpool(follow, session.runs[run])
                found[f"run {run}"] = ("run", {"run": run, **state})
        for key, (name, value) in found.items():
            content = as_json(value)
            if sent.get(key) != content:
                sent[key], spoken = content, now
                yield b"event: " + name.encode() + b"\ndata: " + content + b"\n\n"
        if now - spoken >= ALIVE:
            spoken = now
            yield b": alive\n\n"
        await asyncio.sleep(EVERY)


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
