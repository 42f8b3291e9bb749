"""Single responses with thumbs in a pair table: trl's unpaired format (``prompt``, ``completion``, ``label``).

A row of them has the response as ``chosen`` and again as ``rejected``, and in ``THUMB`` 1 for desirable, 0 for
undesirable; a pair has nothing there. So a table may hold both, and what compares the two responses of such a row finds
no difference.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import FINISH_COLUMNS, ID_COLUMNS, MASK_COLUMNS, RESPONSES, THUMB
from align.errors import DataError

SINGLE = ("completion", "label")
"""Columns of a source with single responses, trl's names."""
HINT = "train on them under the loss kto or bco_unpaired, or a reward model under the objective thumbs"


def thumb_columns(columns: set[str]) -> set[str]:
    """The columns of a source as those of a pair table; unchanged if it has no single responses."""
    if not set(SINGLE) <= columns:
        return columns
    return (columns - set(SINGLE)) | {*RESPONSES, THUMB}


def thumb_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a source with ``SINGLE`` as one of a pair table; a row of a pair stays as it is.

    A label that is no thumb is kept for ``thumb_problem``.
    """
    found = dict(values)
    completion, label = (found.pop(name, None) for name in SINGLE)
    if completion is None and label is None:
        return found
    if any(found.get(side) is not None for side in RESPONSES):
        return found | {THUMB: "a label next to chosen or rejected"}
    thumb = float(label) if isinstance(label, bool) or label in (0, 1) else "no label" if label is None else label
    return found | dict.fromkeys(RESPONSES, completion) | {THUMB: thumb}


def thumb_problem(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(column, what was found, what was expected) if the cell of ``THUMB`` is no thumb; None if it is one, or empty.

    A row with a thumb has one response, which stands as ``chosen`` and as ``rejected``.
    """
    value = row.get(THUMB)
    if value is None:
        return None
    expected = "true (desirable) or false (undesirable), in a row with completion and without a pair"
    if not isinstance(value, int | float) or value not in (0, 1):
        return SINGLE[1], repr(value), expected
    one, other = (row.get(side) for side in RESPONSES)
    return None if one == other else (THUMB, f"{value:g} in a row with two different responses", expected)


def thumb_table(table: Dataset, name: str) -> Dataset:
    """A table in memory with ``SINGLE`` as a pair table; any other as it is.

    Raises:
        DataError: a label is no thumb; ``name`` is the table's.
    """
    if not set(SINGLE) <= set(table.column_names):
        return table
    rows = [thumb_values(row) for row in table]
    for k, row in enumerate(rows):
        if wrong := thumb_problem(row):
            column, found, expected = wrong
            raise DataError(f"{name}: {column} of row {k}: found {found}, expected {expected}", code="pair-value")
    columns = dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])


def mismatched(table: Dataset, step: int) -> Dataset:
    """A tokenized table with, as rejected response of each row, the response of the row before it in its part.

    The parts have ``step`` rows, as many as an optimizer step, so that the mismatched responses of a part are its own
    in another order: trl's estimate of KTO's KL. The first row of a part has the response of its last one. A part of
    one row joins the part before it.

    Args:
        table: has ``ID_COLUMNS``, perhaps ``MASK_COLUMNS``.
        step: rows.
    """
    starts = list(range(0, len(table), step))
    if len(table) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    places = [
        k - 1 if k > start else end - 1
        for start, end in zip(starts, [*starts[1:], len(table)], strict=True)
        for k in range(start, end)
    ]
    return _with_rejected(table, lambda rows: [rows[k] for k in places])


def without_other(table: Dataset) -> Dataset:
    """A tokenized table whose rejected responses are the first tokens of the others, which no loss reads."""
    return _with_rejected(table, lambda rows: [row[:1] for row in rows])


def _with_rejected(table: Dataset, make: Callable[[list[list[int]]], list[list[int]]]) -> Dataset:
    for chosen, rejected in (ID_COLUMNS[1:], MASK_COLUMNS):
        if chosen in table.column_names:
            made = make(list(table[chosen]))
            table = table.remove_columns([rejected]).add_column(rejected, made)
    return table


def are_thumbs(pairs: Dataset) -> np.ndarray:
    """Which rows of a pair table are single responses with thumbs, bool [N]."""
    if THUMB not in pairs.column_names:
        return np.zeros(len(pairs), dtype=bool)
    return ~np.isnan(np.asarray(pairs[THUMB], dtype=np.float64))


def has_thumbs(pairs: Dataset) -> bool:
    """Whether a pair table has single responses with thumbs."""
    return bool(are_thumbs(pairs).any())


def without_thumbs(pairs: Dataset) -> Dataset:
    """The pairs of a table that also has single responses."""
    if not has_thumbs(pairs):
        return pairs
    return pairs.select(np.flatnonzero(~are_thumbs(pairs)))


def refuse_thumbs(pairs: Dataset, what: str) -> None:
    """Raise if a pair table has single responses, where pairs are compared.

    Args:
        pairs: pair table.
        what: what reads pairs, for the message.

    Raises:
        DataError: names the first row and how many there are.
    """
    if not has_thumbs(pairs):
        return
    rows = np.flatnonzero(are_thumbs(pairs)).tolist()
    name = repr(pairs["id"][rows[0]]) if "id" in pairs.column_names else f"in row {rows[0]}"
    raise DataError(
        f"{what}: found {len(rows)} single responses with thumbs among {len(pairs)} rows, the first {name}; expected "
        "pairs, of which two responses are compared",
        code="thumbs",
        hint=HINT,
    )


def unpaired(pairs: Dataset) -> Dataset:
    """The table with a thumb in every row: a pair becomes its chosen response, desirable, and its rejected one, not.

    Both follow each other and keep the other columns of the pair, as in trl's ``unpair_preference_dataset``.
    """
    if not len(pairs) or (THUMB in pairs.column_names and None not in pairs[THUMB]):
        return pairs
    rows = [one for row in pairs for one in _thumbs_of(row)]
    columns = dict.fromkeys([*pairs.column_names, THUMB])
    return Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])


def _thumbs_of(row: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    if row.get(THUMB) is not None:
        return [dict(row)]
    made = []
    for side, thumb in zip(RESPONSES, (1.0, 0.0), strict=True):
        one = dict(row) | dict.fromkeys(RESPONSES, row[side]) | {THUMB: thumb}
        if FINISH_COLUMNS[side] in row:
            one |= dict.fromkeys(FINISH_COLUMNS.values(), row[FINISH_COLUMNS[side]])
        if row.get("id") is not None:
            one["id"] = f"{row['id']}:{side}"
        made.append(one)
    return made
