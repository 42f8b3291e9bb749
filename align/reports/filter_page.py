"""What a filter kept and dropped -> one HTML file; no script, no request, every text escaped."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.filtering.texts import plain
from align.reports import plots
from align.reports.page import environment

BORDER = 6


def write_page(target: Path, table: Dataset, summary: dict[str, Any], source: str) -> None:
    """Render the page.

    Args:
        target: the file.
        table: all pairs with scores, ``kept`` and ``reason``.
        summary: counts, see ``score_and_select``.
        source: where the pairs came from.
    """
    scored = [row for row in table if row["importance"] is not None]
    drawn = {}
    for name in ("margin", "quality", "diversity", "importance"):
        if name in table.column_names:
            series = {
                label: [row[name] for row in scored if row["kept"] == kept]
                for label, kept in (("kept", True), ("dropped", False))
            }
            if any(series.values()):
                drawn[name] = plots.histogram(series, x_title=name)
    page = (
        environment()
        .get_template("filter.html.j2")
        .render(source=source, summary=summary, plots=drawn, border=_border(scored), rules=_examples(table))
    )
    temporary = target.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)


def _border(scored: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The kept pairs with the least and the dropped pairs with the most importance."""
    order = sorted(scored, key=lambda row: (row["importance"], str(row["id"])))
    kept = [row for row in order if row["kept"]][:BORDER]
    dropped = [row for row in order if not row["kept"]][-BORDER:][::-1]
    return {"just kept": [_text(row) for row in kept], "just dropped": [_text(row) for row in dropped]}


def _examples(table: Dataset) -> list[dict[str, Any]]:
    """Some pairs that broke a rule."""
    found = [row for row in table if row["importance"] is None]
    return [_text(found[k]) for k in np.linspace(0, len(found) - 1, min(BORDER, len(found)), dtype=int)]


def _text(row: dict[str, Any]) -> dict[str, Any]:
    parts = {part: plain(row[part]) for part in ("prompt", "chosen", "rejected")}
    return parts | {"id": row["id"], "reason": row["reason"], "importance": row["importance"]}
