"""A viewer that listens on 127.0.0.1, and what tests do with its page in a real browser."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import BrowserContext, Page, expect

from align.commands.view import listening
from align.viewer.decisions import read_decisions
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
            make_app(session, LONG_TOKEN, number), log_level="critical", lifespan="off", timeout_graceful_shutdown=0.25
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


class Tab:
    """A page with what it reported and asked for."""

    def __init__(self, context: BrowserContext) -> None:
        self.context, self.page = context, context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.watch(self.page)

    def watch(self, page: Page) -> None:
        """Collect errors and requests of a page."""
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))
        page.on("console", lambda line: self.errors.append(line.text) if "Content Security" in line.text else None)
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str, page: Page | None = None) -> Page:
        """The page once its list is there."""
        page = page or self.page
        page.goto(address)
        expect(page.locator("#count")).to_contain_text("of")
        expect(page.locator("regular-table tbody tr").first).to_be_visible()
        return page


def idle(page: Page) -> None:
    """Return once what the page was asked for is drawn."""
    expect(page.locator("main[aria-busy=false]")).to_be_visible()


def shown_ids(page: Page) -> list[str]:
    """The ids in the list, from its first row on."""
    return page.evaluate(
        "[...document.querySelectorAll('regular-table tbody tr')].filter((row) => row.id)"
        ".map((row) => row.children[1].textContent)"
    )


def brush(page: Page, column: str, start: float, end: float) -> tuple[float, float]:
    """Drag over a part of a histogram; the ends that its fields then show."""
    over = page.locator(f'.histogram[data-column="{column}"] .u-over')
    box = over.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + (start + end) / 2 * box["width"], y, steps=3)
    page.mouse.move(box["x"] + end * box["width"], y, steps=3)
    page.mouse.up()
    low, high = (page.locator(f'.histogram[data-column="{column}"] input').nth(index).input_value() for index in (0, 1))
    return float(low), float(high)


def open_first(page: Page) -> None:
    """Open the first pair of the list."""
    page.locator("regular-table tbody tr").first.locator("td").nth(1).click()
    expect(page.locator("#pair h2")).to_be_visible()


def settled(page: Page) -> None:
    """Return once the server has all decisions."""
    expect(page.locator("#saved")).to_have_text("")


def saved(folder: Path) -> dict[str, Any]:
    """What the file of decisions comes to, by the id of the pair."""
    file = folder / "decisions.jsonl"
    ledger = read_decisions([file]) if file.exists() else None
    return {} if ledger is None else {key: ledger.outcome(key)[0] for key in ledger.by_pair}
