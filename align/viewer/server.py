"""The server of `align view`: 127.0.0.1 alone, a token for every answer with data, no request to anywhere else."""

import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from align.errors import AlignError, DataError
from align.viewer.answering import Answer, failure, guarded, number
from align.viewer.endpoints import ENDPOINTS, Handler, open_page, open_runs
from align.viewer.followed import follow, report_file
from align.viewer.session import Session
from align.viewer.streams import events_endpoint, search_endpoint

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
TICKET_SECONDS = 60.0
Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


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


def make_app(session: Session, token: str, port: int) -> Guard:
    """The application.

    Args:
        session: what is open.
        token: see ``Guard``.
        port: of the server.
    """
    tickets: dict[str, tuple[Path, float]] = {}

    def ticket(request: Request, body: Any) -> Any:
        """An address for the report of a run, for one minute."""
        file = report_file(_run(session, request))
        if file is None:
            return {"address": None}
        for key in [key for key, (_, until) in tickets.items() if time.monotonic() > until]:
            del tickets[key]
        key = secrets.token_urlsafe(24)
        tickets[key] = (file, time.monotonic() + TICKET_SECONDS)
        return {"address": f"/report/{key}"}

    def report(request: Request, body: Any) -> Response:
        file, until = tickets.get(request.path_params["ticket"], (None, 0.0))
        if file is None or time.monotonic() > until:
            return PlainTextResponse("this address is over; open the report from the page", status_code=404)
        return HTMLResponse(file.read_text(encoding="utf-8"), headers={"content-security-policy": REPORT_POLICY})

    def run(request: Request, body: Any) -> Any:
        return follow(_run(session, request))

    def reopen(request: Request, body: Any) -> Any:
        session.reopen(session.place(request.query_params.get("table", "0")))
        return {}

    routes = [
        Route("/", _static("index.html")),
        *(Route(f"/{name}", _static(name)) for name in FILES),
        *(
            Route(f"/api/{name}", _endpoint(session, work), methods=[method])
            for name, (method, work) in ENDPOINTS.items()
        ),
        Route("/api/search", search_endpoint(session), methods=["POST"]),
        Route("/api/events", events_endpoint(session)),
        Route("/api/run", guarded(run)),
        Route("/api/ticket", guarded(ticket), methods=["POST"]),
        Route("/api/reopen", guarded(reopen), methods=["POST"]),
        Route("/report/{ticket}", guarded(report)),
    ]
    hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}"})
    return Guard(Starlette(routes=routes), token, hosts)


def _endpoint(session: Session, work: Handler) -> Answer:
    def asked(request: Request, body: Any) -> Any:
        request.state.session = session
        if work is open_page:
            session.look_again()
            if not session.tables:
                return open_runs(session)
        return work(session.asked(request.query_params.get("table", "0")), request, body)

    return guarded(asked)


def _run(session: Session, request: Request) -> Path:
    return session.runs[number(request.query_params.get("run", "0"), len(session.runs), "run")]


def _static(name: str) -> Answer:
    async def answer(_: Request) -> Response:
        return FileResponse(FILES[name], media_type=TYPES[FILES[name].suffix])

    return answer
