"""Valid pairs on their way from rows to Arrow, a few thousand at a time, so that the table is in memory about twice."""

import pickle  # nosec B403 - of this process for itself, never of a file
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from align.config.columns import NUMBERS, OPTIONAL, TEXT
from align.data.messages import JSON_MESSAGES, text_array, text_type
from align.data.user_columns import KNOWN, user_array, wider
from align.errors import DataError

SPOOLED = 4096
"""Pairs that are Python objects at a time."""
CODEC = pa.Codec("zstd", 1)
SHOWN_CHARACTERS = 60
Types = dict[str, pa.DataType]
"""Arrow types of the text columns and of the user's, for the rows read so far."""


class PairSpool:
    """Pairs as compressed bytes, fewer than their texts have; Python's objects for them take several times as much.

    Args:
        source: name of the pairs, for messages.
        own: the user's columns.
    """

    def __init__(self, source: str, own: Sequence[str]) -> None:
        self.source, self.own = source, own
        self._whole: list[tuple[int, bytes]] = []
        """Size of the pickle and the compressed pickle of each ``SPOOLED`` pairs."""
        self._last: list[dict[str, Any]] = []

    def add(self, pair: dict[str, Any]) -> None:
        """Append a pair.

        Raises:
            DataError: a message holds an object that is no value of a table.
        """
        self._last.append(pair)
        if len(self._last) == SPOOLED:
            with one_type(self.source, "(rows)"):
                whole = _packed(self._last)
            self._whole.append((len(whole), CODEC.compress(whole, asbytes=True)))
            self._last = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            yield from batch

    def table(self, places: Iterable[int] | None = None) -> pa.Table:
        """The pairs, or those at ascending ``places``, as a table; the spool is empty afterwards.

        Columns of ``OPTIONAL`` without a value are left out.

        Raises:
            DataError: a column has values of two kinds.
        """
        wanted = None if places is None else set(places)
        types, filled = self._types(wanted)
        names = ["id", *TEXT, *(name for name in OPTIONAL if name in filled), *self.own]
        schema = pa.schema([(name, types.get(name) or _known_type(name)) for name in names])
        parts = (record_batch(batch, schema, self.source) for batch in _picked(self._drained(), wanted))
        return pa.Table.from_batches(list(parts), schema=schema)

    def _types(self, wanted: set[int] | None) -> tuple[Types, set[str]]:
        """Types of the texts and the user's columns, and the names of all columns with a value."""
        types: Types = {name: pa.string() for name in TEXT} | {name: pa.null() for name in self.own}
        known: Types = {}
        filled = set[str]()
        for batch in _picked(self._batches(), wanted):
            known = widened(known, batch, self.own, self.source)
            filled |= {name for name in OPTIONAL if any(pair.get(name) is not None for pair in batch)}
        return types | known, filled

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        yield from map(_unpacked, self._whole)
        yield self._last

    def _drained(self) -> Iterator[list[dict[str, Any]]]:
        self._whole.reverse()
        while self._whole:
            yield _unpacked(self._whole.pop())
        last, self._last = self._last, []
        yield last


def _packed(batch: list[dict[str, Any]]) -> bytes:
    """The pickle of a batch.

    Raises:
        TypeError: it holds an object that cannot be pickled.
    """
    try:
        return pickle.dumps(batch)
    except (pickle.PicklingError, AttributeError) as error:
        raise TypeError(str(error)) from None


def _unpacked(part: tuple[int, bytes]) -> list[dict[str, Any]]:
    size, packed = part
    found: list[dict[str, Any]] = pickle.loads(CODEC.decompress(packed, size, asbytes=True))  # nosec B301
    return found


def widened(types: Types, batch: list[dict[str, Any]], own: Sequence[str], source: str) -> Types:
    """The types of the texts and of the user's columns ``own``, given those of the rows before this batch: JSON
    messages stay JSON messages."""
    new = {}
    for name in TEXT:
        with one_type(source, name):
            new[name] = text_type([pair[name] for pair in batch])
    found = {name: JSON_MESSAGES if JSON_MESSAGES in (kind, types.get(name)) else kind for name, kind in new.items()}
    return found | {name: wider(types.get(name), user_array([pair[name] for pair in batch]).type) for name in own}


def record_batch(batch: list[dict[str, Any]], schema: pa.Schema, source: str) -> pa.RecordBatch:
    """The pairs as Arrow.

    Raises:
        DataError: values of two kinds are in one column.
    """
    arrays = []
    for field in schema:
        values = [pair.get(field.name) for pair in batch]
        with one_type(source, field.name):
            make = text_array if field.name in TEXT else pa.array if field.name in KNOWN else user_array
            arrays.append(make(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


@contextmanager
def one_type(source: str, name: str) -> Iterator[None]:
    """Convert Arrow's errors about values of two kinds in the column ``name`` into one message.

    Raises:
        DataError: see above.
    """
    try:
        yield
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source}:{name}: its rows do not fit one column ({' '.join(str(error).split())[:SHOWN_CHARACTERS]})",
            code="pair-type",
            hint="give every row the same kind of value",
        ) from None


def _known_type(name: str) -> pa.DataType:
    return pa.float64() if name in NUMBERS else pa.string()


def _picked(batches: Iterable[list[dict[str, Any]]], wanted: set[int] | None) -> Iterator[list[dict[str, Any]]]:
    """The batches, or their pairs at some places, without batches that become empty."""
    start = 0
    for batch in batches:
        kept = batch if wanted is None else [pair for k, pair in enumerate(batch, start) if k in wanted]
        start += len(batch)
        if kept:
            yield kept
