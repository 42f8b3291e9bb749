"""What a row of a pair table says of itself: its name, and how its responses ended."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from align.config.columns import CUT_OFF, FINISH_COLUMNS, FINISH_REASONS
from align.errors import DataError
from align.io.console import log


def is_cut_off(pair: Mapping[str, Any], side: str) -> bool:
    """Whether the limit of tokens ended a response of a pair; ``side`` is chosen or rejected.

    Raises:
        DataError: the pair says something else of its end than ``FINISH_REASONS``.
    """
    column = FINISH_COLUMNS[side]
    reason = pair.get(column)
    if reason is not None and reason not in FINISH_REASONS:
        raise DataError(
            f"{pair_name(pair) or 'a pair'}: {column}: found {reason!r}, expected {' or '.join(FINISH_REASONS)}",
            code="pair-value",
            hint="a response that a limit of tokens cut off is length, any other stop or nothing",
        )
    return bool(reason == CUT_OFF)


def pair_name(pair: Mapping[str, Any]) -> str:
    """What errors call a row of a pair table; empty if it has no ``id``."""
    return "" if pair.get("id") is None else f"pair {pair['id']}"


def log_cut_off(pairs: Dataset) -> None:
    """Log how many responses were cut off, if any."""
    found = [name for name in FINISH_COLUMNS.values() if name in pairs.column_names]
    count = sum(value == CUT_OFF for name in found for value in pairs[name])
    if count:
        log.info("%d of %d responses were cut off by a limit of tokens: they have no end-of-sequence token",
                 count, 2 * len(pairs))  # fmt: skip
