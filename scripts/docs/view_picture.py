"""Photograph the page of `align view` over a run: a filter on the margins, a scatter, one pair open.

python -m scripts.docs.view_picture runs/demo docs/view.png
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from scripts.bench.viewer_page import WAIT, viewer
from scripts.docs.picture import BROWSERS

AXES = ["reward_rejected", "reward_chosen"]
WIDTH, HEIGHT = 1440, 810
LARGEST = 300_000
SETTLE_MS = 2_000


def show(page: Page, address: str, place: int) -> None:
    """Open the first table of a run by a link: margins up to 0, the lowest first; then the pair at a place of it."""
    query = {"filters": [{"column": "margin", "low": None, "high": 0}], "sort": "margin"}
    page.goto(f"{address}/pairs?q={quote(json.dumps(query))}&xy={quote(json.dumps(AXES))}")
    page.locator("#row-0 td.text").filter(has_not_text="…").first.wait_for(timeout=WAIT)
    page.locator(f"#row-{place} td").nth(1).click()
    page.locator("#pair h2").wait_for()
    page.mouse.move(WIDTH - 1, HEIGHT - 1)
    page.wait_for_timeout(SETTLE_MS)


def main() -> None:
    """Read the command line and take the picture.

    Raises:
        SystemExit: there is no Chromium, or the picture is too large for a page of the documentation.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--place", type=int, default=0, help="place in the list of the pair that is opened")
    arguments = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("no Chromium here; on Debian: apt install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "view.png"
        made = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        with viewer(arguments.run, "--decisions", str(Path(folder) / "decisions.jsonl")) as address:
            page = made.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            show(page, address, arguments.place)
            page.screenshot(path=file)
        made.close()
        Image.open(file).quantize(128).save(arguments.image, optimize=True)
    if (size := arguments.image.stat().st_size) > LARGEST:
        raise SystemExit(f"{arguments.image}: {size} bytes, expected at most {LARGEST}")


if __name__ == "__main__":
    main()
