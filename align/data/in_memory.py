"""Tables in memory (a Dataset, a list of dictionaries, a DataFrame) -> the checked pair table, as files give it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pydantic import ValidationError

from align.config import PairsSection
from align.data.messages import without_nulls
from align.data.near_copies import with_near_copies
from align.data.pairs import check_rows
from align.data.readers import Row, numbered_rows, read_table
from align.data.thumbs import refuse_thumbs, thumb_columns
from align.data.user_columns import unused_columns
from align.data.validation import Problem
from align.errors import DataError, listed, python_words
from align.io.console import log

NAME = "pairs"
"""What messages call the table."""
HINTS = {"data-column": 'name it: columns={"chosen": "preferred"}', "data-empty": "give one pair per row"}


def pairs_from_dataset(ds: Any, *, columns: Mapping[str, str] | None = None, near_copies: bool = False) -> Dataset:
    """Check a table of preference pairs and bring it into the form that everything here takes.

    The result is what reading the same rows from a file gives: trl's explicit-prompt format, plain or conversational,
    with ``id``, ``prompt``, ``chosen``, ``rejected`` and those columns of ``align.config.columns`` that the table has.
    A prompt that is only the shared beginning of both responses is cut off from them. ``margin`` is filled in from
    ``reward_chosen`` and ``reward_rejected``. The order of the rows stays. A second call changes nothing.

    Args:
        ds: ``datasets.Dataset``, list of dictionaries or ``pandas.DataFrame``; one pair per row.
        columns: name in the pair table -> name in ``ds``, for example ``{"chosen": "preferred"}``.
        near_copies: keep pairs with nearly the same prompt or long response together in every split and interval, by
            the column ``split_group``; equal texts always are.

    Returns:
        N pairs. ``id`` is the row's own as a string, else a hash of the three texts, the same whatever the container.

    Raises:
        DataError: ``ds`` is no such table, has no rows or lacks a column; or rows cannot be used, all of which are
            counted and the first 20 named, from row 0.
    """
    pairs = checked_table(ds, NAME, columns=columns)
    return with_near_copies(pairs) if near_copies else pairs


def checked_table(
    ds: Any, name: str, *, columns: Mapping[str, str] | None = None, carry: bool = False, thumbs: bool = False
) -> Dataset:
    """``pairs_from_dataset`` for an argument of another name; ``carry`` keeps columns that the program does not read.

    Raises:
        DataError: see there; or single responses with thumbs, unless ``thumbs`` takes them.
    """
    with python_words(HINTS):
        rows, names = read_table(memory_rows(ds, name), _section(name, columns))
    checked = check_rows(rows, names, name, carry=carry)
    if checked.problems:
        raise _unusable(name, checked.problems, len(checked.invalid), len(rows))
    if not thumbs:
        refuse_thumbs(checked.pairs, name)
    unused = [column for column in unused_columns(thumb_columns(names)) if column not in checked.pairs.column_names]
    if unused:
        log.info("%s: columns that are not used: %s", name, ", ".join(unused))
    return checked.pairs


def _section(name: str, columns: Mapping[str, str] | None) -> PairsSection:
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"columns: found {columns!r}, expected a dict of names", code="data-column")
    try:
        return PairsSection(path=name, columns=dict(columns or {}))
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise DataError(f"columns: {reason}", code="data-column") from None


def _unusable(name: str, problems: Sequence[Problem], count: int, total: int) -> DataError:
    lines = [
        f"row {problem.row}, {problem.column}: found {problem.found}, expected {problem.expected}"
        for problem in problems
    ]
    return DataError(
        f"{name}: {count} of {total} rows cannot be used (the first row is row 0):\n{listed(lines)}",
        code=problems[0].code,
        hint="fix these rows, or leave them out: ds.select(...)",
    )


def memory_rows(table: Any, name: str) -> Iterator[Row]:
    """Rows of a table in memory, numbered from 0 as Python counts them.

    Args:
        table: ``datasets.Dataset``, sequence of dictionaries or ``pandas.DataFrame``. NaN and NA in a DataFrame are
            missing values, and an index with a name is a column (``set_index("id")``).
        name: name of the table, for messages.

    Raises:
        DataError: it is something else, or a DataFrame has two columns of one name.
    """
    if isinstance(table, Dataset):
        return numbered_rows(table, first=0)
    if isinstance(table, pd.DataFrame):
        return _frame_rows(table, name)
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        return _sequence_rows(table)
    raise _wrong_type(table, name)


def _sequence_rows(table: Sequence[Any]) -> Iterator[Row]:
    for number, row in enumerate(table):
        if isinstance(row, dict):
            yield Row(number, {str(key): without_nulls(_plain_value(value)) for key, value in row.items()})
        else:
            yield Row(number, {}, f"found {_article(type(row).__name__)}, expected a dict")


def _frame_rows(frame: pd.DataFrame, name: str) -> Iterator[Row]:
    named = [level for level in frame.index.names if level is not None and level not in frame.columns]
    frame = frame.reset_index(level=named) if named else frame
    names = [str(column) for column in frame.columns]
    twice = [column for column in names if names.count(column) > 1]
    if twice:
        raise DataError(f"{name}: column {twice[0]!r} is there twice", code="data-column")
    columns = [frame.iloc[:, k].tolist() for k in range(len(names))]
    return (
        Row(number, {key: without_nulls(_or_none(value)) for key, value in zip(names, values, strict=True)})
        for number, values in enumerate(zip(*columns, strict=True))
    )


def _plain_value(value: Any) -> Any:
    """The value without numpy's types."""
    if isinstance(value, np.ndarray):
        return [_plain_value(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _or_none(value: Any) -> Any:
    """The value of a DataFrame's cell, None for NaN and NA, which stand for a missing value there."""
    plain = _plain_value(value)
    missing = plain is pd.NA or plain is pd.NaT or (isinstance(plain, float) and np.isnan(plain))
    return None if missing else plain


def _wrong_type(table: Any, name: str) -> DataError:
    found, hint = _article(type(table).__name__), "datasets.Dataset.from_list, from_dict and from_pandas make one"
    if isinstance(table, DatasetDict | IterableDatasetDict):
        found, hint = f"{found} with the splits {', '.join(table)}", 'choose a split: ds["train"]'
    elif isinstance(table, IterableDataset):
        hint = "datasets.Dataset.from_list(list(ds.take(n))) makes one of its first n rows"
    elif isinstance(table, str | bytes):
        hint = 'datasets.load_dataset("json", data_files=...)["train"] reads a file'
    return DataError(
        f"{name}: found {found}, expected a datasets.Dataset, a list of dicts or a pandas.DataFrame",
        code="data-type",
        hint=hint,
    )


def _article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
