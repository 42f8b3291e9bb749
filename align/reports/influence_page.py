"""Page of `align entangle influence`: one HTML file, without script or request, with every text escaped."""

from pathlib import Path
from typing import Any

from align.io.files import write_text
from align.reports.html import environment

CHARACTERS = 1500
"""Characters of a text that are shown."""


def write_influence_page(target: Path, report: dict[str, Any]) -> None:
    """Render the page from the content of influence.json."""
    page = environment().get_template("influence.html.j2").render(report=report, limit=CHARACTERS)
    write_text(target, page)
