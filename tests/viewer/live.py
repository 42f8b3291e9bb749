"""A viewer that listens on 127.0.0.1, for tests with a real browser."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from align.commands.view import listening
from align.viewer.server import make_app
from align.viewer.session import Options, Session
from align.viewer.sources import SourceTable, open_table
from tests.viewer.helpers import TOKEN

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
LONG_TOKEN = TOKEN.replace("-", "_")


@contextmanager
def served(*given: Any, scratch: Path, runs: tuple[Path, ...] = (), port: int = 0, **options: Any) -> Iterator[str]:
    """Address, with its token, of a server over files or tables; it is stopped at the end."""
    scratch.mkdir(exist_ok=True)
    tables = [one if isinstance(one, SourceTable) else open_table(str(one), {}, "train", scratch) for one in given]
    session = Session(tables, runs, scratch, Options(**({"who": "ann", "text_cache": True} | options)))
    with listening(port) as bound:
        number = bound.getsockname()[1]
        config = uvicorn.Config(
            make_app(session, LONG_TOKEN, number), log_level="critical", lifespan="off", timeout_graceful_shutdown=0
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end and thread.is_alive()
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{number}/#{LONG_TOKEN}"
        finally:
            server.should_exit = True
            thread.join(10)
            session.close()
