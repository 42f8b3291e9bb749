"""The texts of a pair table as Arrow columns, whatever their format."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from align.config.columns import TEXT

WORD = re.compile(r"\w+", re.UNICODE)


def plain(part: Any) -> str:
    """Text of a prompt or response: a string, or a list of messages."""
    return part if isinstance(part, str) else "\n".join(str(turn["content"]) for turn in part)


def words(part: Any) -> list[str]:
    """Words of a prompt or response in lower case, punctuation left out."""
    return WORD.findall(plain(part).lower())


def texts(pairs: Dataset, start: int = 0, stop: int | None = None) -> pa.Array:
    """Plain texts [3 n] of the rows from ``start`` to ``stop``: prompt, chosen, rejected, prompt, ..."""
    rows = pairs.with_format("arrow")[start : len(pairs) if stop is None else stop]
    return interleaved(*(rows[part] for part in TEXT))


def texts_of(pairs: Dataset, rows: list[int]) -> pa.Array:
    """Plain texts [3 R] of the rows at these places, as ``texts`` orders them."""
    found = pairs.select(rows).with_format("arrow")[:]
    return interleaved(*(found[part] for part in TEXT))


def column(part: pa.ChunkedArray) -> pa.Array:
    """One column of a pair table as plain text."""
    part = part.combine_chunks()
    if pa.types.is_string(part.type) or pa.types.is_large_string(part.type):
        return part.cast(pa.string())
    return pa.array([plain(item) for item in part.to_pylist()], type=pa.string())


def interleaved(prompt: pa.ChunkedArray, chosen: pa.ChunkedArray, rejected: pa.ChunkedArray) -> pa.Array:
    """The texts of three columns of n rows row by row, [3 n]."""
    parts = pa.concat_arrays([column(part) for part in (prompt, chosen, rejected)])
    count = len(parts) // 3
    return parts.take(pa.array(np.arange(3 * count).reshape(3, count).T.ravel()))


def cells(pairs: Dataset, name: str) -> pa.ChunkedArray:
    """One column of a pair table, whether or not its rows were selected from another."""
    return pairs.select_columns([name]).with_format("arrow")[:][name]
