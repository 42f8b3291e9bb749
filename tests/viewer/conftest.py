"""A headless Chromium for the tests of the viewer's page."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.viewer.live import BROWSER, Tab


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    expect.set_options(timeout=15_000)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab in a profile of its own; no error of the page and no request to elsewhere is let through."""
    context = browser.new_context(viewport={"width": 1500, "height": 900})
    made = Tab(context)
    yield made
    context.close()
    assert made.errors == []
    assert {address.split("/")[2].split(":")[0] for address in made.asked if address.startswith("http")} <= {
        "127.0.0.1"
    }
