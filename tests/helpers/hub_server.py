"""A local stand-in of the Hugging Face hub's HTTP API: repositories and commits.

Every file is asked for as a part of the commit. The real hub takes large files through its Xet store, which this server
does not have, so that part of an upload is huggingface_hub's own and not tried here.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REGISTRY = "/api/agent-harnesses"
"""What huggingface_hub itself looks up once a day."""
TOKEN = "hf_TestTokenThatIsNotOne0123456789"


@dataclass
class Hub:
    """What the server holds, and which requests it has seen."""

    private: dict[str, bool] = field(default_factory=dict)
    """``models/user/name`` -> whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""
    status: int = 0
    """Answer every commit with this status."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != REGISTRY:
            self.hub.requests.append(f"{self.command} {self.path}")
        return content

    def do_GET(self) -> None:
        self._body()
        name = self.path.removeprefix("/api/").partition("?")[0].split("/revision/")[0]
        if name in self.hub.private:
            repository = name.partition("/")[2]
            self._answer({"id": repository, "private": self.hub.private[name], "sha": "0" * 40, "siblings": []})
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self._body()
        if f"Bearer {TOKEN}" not in self.headers.get("Authorization", ""):
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            kind, owner = asked.get("type", "model"), asked.get("organization") or "user"
            name = f"{kind}s/{owner}/{asked['name']}"
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.private.setdefault(name, private)
            prefix = "datasets/" if kind == "dataset" else ""
            self._answer({"url": f"{self.hub.address}/{prefix}{owner}/{asked['name']}"})
        elif self.path.startswith("/api/validate-yaml"):
            self._answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path and self.hub.status:
            self._answer({"error": "the server is full"}, self.hub.status)
        elif "/commit/" in self.path:
            self._commit(self.path.removeprefix("/api/").partition("/commit/")[0], body)
        else:
            self._answer({"error": f"no such endpoint {self.path}"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        kept = self.hub.files.setdefault(name, {})
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
        address = f"{self.hub.address}/{name.removeprefix('models/')}/commit/{'1' * 40}"
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": address})


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub at ``hub.address``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
