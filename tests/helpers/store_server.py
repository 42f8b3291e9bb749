"""A local S3 server (moto's) that checks the key and fails on request.

    python -m tests.helpers.store_server FOLDER

It writes its port to FOLDER/port and applies the ``Fault`` in FOLDER/fault.json to every request that matches.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KEY, SECRET = "GOODKEY-0123456789", "kept-to-itself-0123456789abcdef"
PORT, FAULT, SEEN = "port", "fault.json", "requests.txt"
NO_ACCOUNT = "<Error><Code>InvalidAccessKeyId</Code><Message>This key is not in our records.</Message></Error>"


@dataclass(frozen=True, slots=True)
class Fault:
    """Failure of the requests of a method whose path and query contain a text."""

    method: str
    holds: str = ""
    status: str = ""
    """Status of the answer; empty: the request is only delayed by ``seconds``."""
    code: str = ""
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Make the server of ``folder`` fail this way."""
        (folder / FAULT).write_text(json.dumps(asdict(self)))


class Faulty:
    """A WSGI application in front of another one."""

    def __init__(self, inner: Callable[..., Iterable[bytes]], folder: Path) -> None:
        self.inner, self.folder, self.lock = inner, folder, threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        with self.lock, (self.folder / SEEN).open("a") as stream:
            stream.write(f"{environ['REQUEST_METHOD']} {asked}\n")
        if KEY not in environ.get("HTTP_AUTHORIZATION", ""):
            return self.answer(start, "403 Forbidden", NO_ACCOUNT)
        file = self.folder / FAULT
        if file.exists():
            fault = Fault(**json.loads(file.read_text()))
            if fault.method == environ["REQUEST_METHOD"] and fault.holds in asked:
                time.sleep(fault.seconds)
                if fault.status:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                    body = f"<Error><Code>{fault.code}</Code><Message>said by the test</Message></Error>"
                    return self.answer(start, fault.status, body)
        return self.inner(environ, start)

    def answer(self, start: Callable[..., Any], status: str, body: str) -> Iterable[bytes]:
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body.encode()]


def main(folder: Path) -> None:
    """Serve until killed."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = Faulty(DomainDispatcherApplication(create_backend_app), folder)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    (folder / f"{PORT}.tmp").write_text(str(server.port))
    (folder / f"{PORT}.tmp").replace(folder / PORT)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
