"""Photograph the first screen of a report.

python -m scripts.docs.picture runs/demo/report.html docs/report.png
"""

import argparse
import shutil
import subprocess  # nosec B404 - of the browser that draws the page
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(page: Path, image: Path, width: int = 1000, height: int = 1040) -> None:
    """Write the first ``height`` pixels of ``page``, drawn ``width`` pixels wide, as a PNG.

    Raises:
        SystemExit: no Chromium is on the path, or it wrote no picture.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser found, looked for {', '.join(BROWSERS)}; on Debian: apt install chromium")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command = [browser, *flags, f"--window-size={width},{height}", f"--screenshot={image.resolve()}"]
        subprocess.run([*command, page.resolve().as_uri()], check=False, capture_output=True, timeout=120)
    if not image.is_file():
        raise SystemExit(f"{browser} wrote no picture of {page}")


def main() -> None:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    arguments = parser.parse_args()
    photograph(arguments.page, arguments.image)


if __name__ == "__main__":
    main()
