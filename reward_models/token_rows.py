"""Token ids of many texts in one array, 4 bytes a token, and keys by which equal rows are found."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
from datasets import Dataset

KEY_BYTES = 16
"""Bytes of a key: two of 10^9 different rows have the same one with probability 10^-21."""
SIDES = ("chosen_ids", "rejected_ids")
ROWS = 1024
"""Rows of a table that are read at a time."""
ARROW_ROWS = 1 << 14
"""Rows of one chunk of an Arrow column, whose offsets have 32 bits."""


class SegmentedIds(list[int]):
    """Token ids of a sentence pair."""

    second: int = 0
    """Where the second text begins, by the token type ids; the length where the tokenizer gives none."""


class TokenRows(Sequence[list[int]]):
    """Rows of token ids, kept as one array; a row that is read is a list, of a sentence pair ``SegmentedIds``."""

    def __init__(self, rows: Iterable[list[int]] = ()) -> None:
        self._ids, self._ends, self._seconds = array("i"), array("q", [0]), array("i")
        self.extend(rows)

    def extend(self, rows: Iterable[list[int]]) -> None:
        """Append rows."""
        for row in rows:
            self._ids.extend(row)
            self._ends.append(len(self._ids))
            self._seconds.append(row.second if isinstance(row, SegmentedIds) else -1)

    def __len__(self) -> int:
        return len(self._seconds)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenRows": ...
    def __getitem__(self, index: int | slice) -> "list[int] | TokenRows":
        """One row as a list, or some as ``TokenRows``."""
        if isinstance(index, slice):
            return TokenRows(self[k] for k in range(*index.indices(len(self))))
        place = range(len(self))[index]
        ids = self._ids[self._ends[place] : self._ends[place + 1]].tolist()
        if self._seconds[place] < 0:
            return ids
        segmented = SegmentedIds(ids)
        segmented.second = self._seconds[place]
        return segmented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenRows):
            return NotImplemented
        return (self._ids, self._ends, self._seconds) == (other._ids, other._ends, other._seconds)

    __hash__ = None  # type: ignore[assignment]

    @property
    def segmented(self) -> bool:
        """Whether a row is of a sentence pair."""
        return any(second >= 0 for second in self._seconds)

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [N]."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64))

    def arrow(self) -> pa.ChunkedArray:
        """The rows as a column of lists of int32, without a copy of the ids."""
        values, ends = pa.array(np.frombuffer(self._ids, dtype=np.int32)), np.frombuffer(self._ends, dtype=np.int64)
        chunks = []
        for start in range(0, len(self), ARROW_ROWS):
            own = ends[start : start + ARROW_ROWS + 1]
            offsets = pa.array((own - own[0]).astype(np.int32))
            chunks.append(pa.ListArray.from_arrays(offsets, values[int(own[0]) : int(own[-1])]))
        return pa.chunked_array(chunks, type=pa.list_(pa.int32()))


def row_key(*rows: Sequence[int]) -> bytes:
    """Key of one or several rows of token ids, which rows with other ids or other segments do not have."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for row in rows:
        head = [len(row), row.second if isinstance(row, SegmentedIds) else -1]
        state.update(np.array([*head, *row], dtype=np.int64).tobytes())
    return state.digest()


def first_of_equals(keys: Sequence[bytes]) -> tuple[list[int], np.ndarray]:
    """Index of the first row of each key, [M], and for every row its place among those, int64 [N]."""
    places: dict[bytes, int] = {}
    source = np.fromiter((places.setdefault(key, len(places)) for key in keys), np.int64, len(keys))
    firsts = np.empty(len(places), dtype=np.int64)
    firsts[source[::-1]] = np.arange(len(keys))[::-1]
    return firsts.tolist(), source


class PairNames:
    """Names of the pairs of a table by the token ids of their responses, 16 bytes a pair.

    Args:
        table: ``chosen_ids``, ``rejected_ids`` and ``id``; without an id a pair is named by its row.
    """

    def __init__(self, table: Dataset) -> None:
        self._names = table.select_columns(["id"]) if "id" in table.column_names else None
        ids, keys = table.select_columns(list(SIDES)), np.empty(len(table), dtype=np.uint64)
        for start in range(0, len(ids), ROWS):
            part = ids[start : start + ROWS]
            keys[start : start + ROWS] = [_short(*pair) for pair in zip(*(part[side] for side in SIDES), strict=True)]
        self._rows = keys.argsort(kind="stable")
        self._keys = keys[self._rows]

    def of(self, chosen: Sequence[int], rejected: Sequence[int]) -> str:
        """Name of the last pair with these token ids, "unknown" if there is none."""
        key = _short(chosen, rejected)
        place = int(np.searchsorted(self._keys, key, side="right")) - 1
        if place < 0 or self._keys[place] != key:
            return "unknown"
        row = int(self._rows[place])
        return str(row if self._names is None else self._names[row]["id"])


def _short(*rows: Sequence[int]) -> np.uint64:
    return np.uint64(int.from_bytes(row_key(*map(list, rows))[:8], "little"))
