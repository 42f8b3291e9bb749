"""Tokens of a pair with their share of its entanglement, as `align entangle report` measured them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.columns import RESPONSES
from align.viewer.measured import TOKENS, Measured

ABOVE = 3
"""Folders above a file of measurements in which its tokens may lie."""
LARGEST = 200_000_000


def measured_tokens(measured: Sequence[Measured], pair: str | None) -> list[dict[str, Any]]:
    """The measurements of one pair, by the files of entanglement that belong to its table."""
    found = []
    for file in dict.fromkeys(file for one in measured if (file := _beside(one.file)) is not None):
        for entry in _read(file):
            if isinstance(entry, dict) and entry.get("id") == pair and pair is not None:
                numbers = {name: entry.get(name) for name in ("verdict", "cosine", "norm_ratio")}
                sides = {name: _tokens(entry.get(name)) for name in RESPONSES}
                found.append({"name": str(file.parent), **numbers, **sides})
    return found


def _tokens(given: Any) -> list[dict[str, Any]]:
    """Text, value, and value over the largest of the response (-1 to 1) of each token."""
    rows = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    values = [float(one.get("value") or 0.0) for one in rows]
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return [
        {"text": str(one.get("text")), "value": value, "shade": value / largest if largest > 0 else 0.0}
        for one, value in zip(rows, values, strict=True)
    ]


def _beside(file: Path) -> Path | None:
    """The tokens of a file of measurements, which lie beside it or in a folder around it."""
    return next((one / TOKENS for one in list(file.parents)[:ABOVE] if (one / TOKENS).is_file()), None)


def _read(file: Path) -> list[Any]:
    try:
        if file.stat().st_size > LARGEST:
            return []
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
