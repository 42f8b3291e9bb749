"""How the server of `align view` answers: JSON of any value, errors by their code, and the JSON objects it is sent."""

import json
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import duckdb
import pyarrow as pa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from align.errors import AlignError, DataError, EnvironmentProblem
from align.io.console import log

STATUS = {
    "view-token": 401, "view-host": 421, "table-changed": 409, "decision-stale": 409, "view-gone": 410,
    "disk-full": 507, "output-folder": 507, "view-query": 400, "decision": 400, "view-failed": 500,
}  # fmt: skip
OTHER = 422
LARGEST_BODY = 8_000_000
Answer = Callable[[Request], Awaitable[Response]]


def as_json(value: Any) -> bytes:
    """JSON of any value: infinities as strings, NaN as null, and what JSON has no type for as ``str`` of it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str, separators=(",", ":"))
        return text.encode()
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=str, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def json_answer(value: Any, status: int = 200) -> Response:
    """A value as an answer."""
    return Response(as_json(value), status_code=status, media_type="application/json")


def error_body(error: AlignError) -> dict[str, Any]:
    """An error as the page shows it."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


def failure(error: AlignError) -> Response:
    """The answer to a request that failed."""
    return json_answer(error_body(error), STATUS.get(error.code, OTHER))


def as_failure(error: Exception) -> AlignError:
    """What any error of a database, a file or a disk means to the page."""
    if isinstance(error, AlignError):
        return error
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return EnvironmentProblem(
        f"the question could not be answered ({first})", code="view-failed",
        hint="ask again; if it stays, start `align view` again",
    )  # fmt: skip


FAILURES = (AlignError, duckdb.Error, OSError, pa.ArrowException)
"""What a table, a run or a disk can do to a request; anything else is a defect."""


def guarded(work: Callable[[Request, Any], Any]) -> Answer:
    """An endpoint: ``work`` runs in a thread with the request and the object that was sent, and returns JSON."""

    async def answer(request: Request) -> Response:
        try:
            body = await read_body(request) if request.method == "POST" else None
            found = await run_in_threadpool(work, request, body)
        except FAILURES as error:
            return failure(as_failure(error))
        except Exception as error:
            log.error("a defect of the program, please report it with these lines:\n%s", traceback.format_exc())
            return failure(as_failure(error))
        return found if isinstance(found, Response) else json_answer(found)

    return answer


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent; an empty body is an empty one.

    Raises:
        DataError: it is none, or too large.
    """
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_BODY:
            raise DataError(f"request: more than {LARGEST_BODY} bytes", code="view-query")
    try:
        found = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError("request: expected a JSON object", code="view-query", hint="reload the page")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            "request: found half of a character (a lone surrogate), which no file of text can hold", code="view-query",
            hint="remove it from the text",
        ) from None  # fmt: skip
    return found


def number(given: Any, end: int, what: str) -> int:
    """An integer from 0 to below ``end``, of an address.

    Raises:
        DataError: it is none.
    """
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 12 and int(given) < end:
        return int(given)
    raise DataError(f"{what}: found {str(given)[:40]!r}, expected 0 to {end - 1}", code="view-query", hint="reload")
