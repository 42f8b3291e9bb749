"""Markdown tables, and the places in a page that hold the tables of a script."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

END = "<!-- end of tables -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the titles ``head``; every row has as many cells."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def compact(value: Any) -> str:
    """JSON on one line with numbers of five decimals, for results that are kept."""
    rounded = json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 5))
    return json.dumps(rounded, separators=(",", ":")) + "\n"


def insert(text: str, tables: str, mark: str) -> str:
    """Replace what ``text`` holds between ``<!-- tables of MARK -->`` and the next ``END`` by ``tables``.

    Raises:
        ValueError: one of the two lines is missing.
    """
    begin = f"<!-- tables of {mark} -->"
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"found no {begin!r} with {END!r} after it; do: add both lines to the page")
    return f"{before}{begin}\n\n{tables}\n\n{END}{after}"


def update_page(page: Path, tables: str, mark: str) -> None:
    """``insert`` in a file."""
    page.write_text(insert(page.read_text(encoding="utf-8"), tables, mark), encoding="utf-8")
