"""The page of `align view` over many pairs in a headless Chromium: from an action to what is painted. Prints JSON.

The pairs are those of scripts/bench/viewer.py. The server is the command itself, in a process of its own on the machine
of the browser. A time ends when the list, the bars and the counts that belong to the action are painted.

    python -m scripts.bench.viewer_page --pairs 1000000 --output studies/viewer_page.json
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from playwright.sync_api import Page, sync_playwright

from scripts.bench.viewer import RARE, make_pairs
from scripts.docs.picture import BROWSERS

BRUSHES = ((0.30, 0.35), (0.40, 0.60), (0.20, 0.80), (0.55, 0.58), (0.10, 0.50), (0.45, 0.50), (0.60, 0.90))
COMMAND = "from align.cli.main import main; main()"
WAIT = 120_000
UNTIL_PAINTED = """(action) => { window.painted = new Promise((done) => addEventListener(action, () => {
  const began = performance.now();
  const look = () => document.getElementById("pairs").ariaBusy === "true" ? setTimeout(look, 2)
    : requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000)));
  setTimeout(look);
}, { capture: true, once: true })); }"""


@contextmanager
def viewer(pairs: Path, *options: str) -> Iterator[str]:
    """Address of a viewer over a file or a run, in a process of its own."""
    command = [sys.executable, "-c", COMMAND, "view", str(pairs), "--no-browser", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(20)


def passing(page: Page) -> int:
    """How many pairs pass, as the page says."""
    return int(page.locator("#count b").inner_text().replace(",", ""))


def brush(page: Page, column: str, start: float, end: float) -> dict[str, float]:
    """Drag over a part of a histogram: seconds from the release of the button, ends of the filter, pairs that pass."""
    over = page.locator(f'.histogram[data-column="{column}"] .u-over').bounding_box()
    assert over is not None
    y = over["y"] + over["height"] / 2
    page.mouse.move(over["x"] + start * over["width"], y)
    page.mouse.down()
    page.mouse.move(over["x"] + end * over["width"], y)
    page.evaluate(UNTIL_PAINTED, "mouseup")
    page.mouse.up()
    seconds = page.evaluate("window.painted")
    low, high = (
        float(page.locator(f'.histogram[data-column="{column}"] input').nth(index).input_value()) for index in (0, 1)
    )
    return {"seconds": seconds, "low": low, "high": high, "count": passing(page)}


def search(page: Page, text: str, any_case: bool) -> dict[str, float]:
    """Type a text: seconds from Enter to the whole list of hits, and how many there are."""
    page.locator("#search-case").set_checked(any_case)
    page.locator("#search-text").fill(text)
    page.evaluate(UNTIL_PAINTED, "keydown")
    page.locator("#search-text").press("Enter")
    seconds = page.evaluate("window.painted")
    found = {"seconds": seconds, "count": passing(page)}
    page.locator("#search-text").fill("")
    page.evaluate(UNTIL_PAINTED, "keydown")
    page.locator("#search-text").press("Enter")
    page.evaluate("window.painted")
    return found


def measure(page: Page, address: str) -> dict[str, Any]:
    """All times of the page over the table that a viewer has open."""
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.locator("main[aria-busy=false] regular-table tbody tr").first.wait_for()
    ready = page.evaluate("performance.now()") / 1000
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    brushes = [brush(page, "margin", *ends) for ends in BRUSHES]
    page.locator("#toolbar").get_by_role("button", name="Without").first.click()
    page.locator("main[aria-busy=false]").wait_for()
    start = time.monotonic()
    page.locator("regular-table").focus()
    page.keyboard.press("End")
    last = page.locator(f"#row-{passing(page) - 1}.cursor td").nth(1)
    last.wait_for()
    end = {"id": last.inner_text(), "seconds": time.monotonic() - start}
    page.locator('#search-text[placeholder="Search the texts"]').wait_for()
    return {
        "first_paint": painted, "ready": ready, "brushes": brushes, "last_row": end,
        "search_exact": search(page, RARE, any_case=False),
        "search_any_case": search(page, RARE.lower(), any_case=True),
        "heap_mb": page.evaluate("performance.memory.usedJSHeapSize") / 1e6,
    }  # fmt: skip


def run(pairs: Path) -> dict[str, Any]:
    """Times over a pair file, in a Chromium of its own.

    Raises:
        SystemExit: there is no Chromium.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("no Chromium here; on Debian: apt install chromium")
    with viewer(pairs) as address, sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        try:
            found = measure(made.new_page(viewport={"width": 1500, "height": 900}), address)
        finally:
            made.close()
    times = [one["seconds"] for one in found["brushes"]]
    return {"brush_median": float(np.median(times)), "brush_worst": max(times), **found}


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path, help="a table that --pairs has made before")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "pairs.parquet"
        if arguments.file is None:
            make_pairs(arguments.pairs, file)
        load = os.getloadavg()[0]
        found = {"pairs": pq.read_metadata(file).num_rows, **run(file)}
    found["machine"] = {"cores": os.cpu_count(), "load_before": load, "platform": platform.platform()}
    text = json.dumps(found, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
