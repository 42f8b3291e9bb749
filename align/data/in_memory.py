"""Tables of pairs that are in memory: a Dataset, a list of dictionaries or a DataFrame -> numbered rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from align.data.messages import without_nulls
from align.data.readers import Row, numbered_rows
from align.errors import DataError


def memory_rows(table: Any, name: str) -> Iterator[Row]:
    """Rows of a table in memory, numbered from 0 as Python counts them.

    Args:
        table: ``datasets.Dataset``, sequence of dictionaries or ``pandas.DataFrame``. NaN and NA in a DataFrame are
            missing values.
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
