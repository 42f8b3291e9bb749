"""Page of `align data check --deep`: one HTML file, without script or request, with every text escaped."""

from pathlib import Path
from typing import Any

from align.io.files import write_text
from align.reports.html import environment

LEVELS = ("fine", "look", "act")
"""Names of the levels 0, 1 and 2."""


def write_diagnosis_page(target: Path, found: dict[str, Any]) -> None:
    """Render the page.

    Args:
        target: the file.
        found: content of diagnosis.json.
    """
    rows = [
        {**one, "low": _place(one["accuracy"]["low"]), "high": _place(one["accuracy"]["high"]),
         "at": _place(one["accuracy"]["value"])}
        for one in found["shortcuts"]
    ]  # fmt: skip
    page = environment().get_template("diagnosis.html.j2").render(found=found, shortcuts=rows, levels=LEVELS)
    write_text(target, page)


def _place(accuracy: float | None) -> float | None:
    """Where an accuracy stands on a bar from 0.4 to 1, in percent."""
    return None if accuracy is None else round(100 * min(max((accuracy - 0.4) / 0.6, 0.0), 1.0), 2)
