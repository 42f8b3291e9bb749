"""``pairs_from_dataset``: any table in memory -> the checked pair table that everything else takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from pydantic import ValidationError

from align.api.words import python_words
from align.config import PairsSection
from align.data.in_memory import memory_rows
from align.data.pairs import check_rows, unused_columns
from align.data.readers import read_table
from align.data.validation import Problem
from align.errors import DataError, listed
from align.io.console import log

NAME = "pairs"
"""What messages call the table."""
HINTS = {"data-column": 'name it: columns={"chosen": "preferred"}', "data-empty": "give one pair per row"}


def pairs_from_dataset(ds: Any, *, columns: Mapping[str, str] | None = None) -> Dataset:
    """Check a table of preference pairs and bring it into the form that everything here takes.

    The result is what reading the same rows from a file gives: trl's explicit-prompt format, plain or conversational,
    with ``id``, ``prompt``, ``chosen``, ``rejected`` and those columns of ``align.config.columns`` that the table has.
    A prompt that is only the shared beginning of both responses is cut off from them. ``margin`` is filled in from
    ``reward_chosen`` and ``reward_rejected``. The order of the rows stays. A second call changes nothing.

    Args:
        ds: ``datasets.Dataset``, list of dictionaries or ``pandas.DataFrame``; one pair per row.
        columns: name in the pair table -> name in ``ds``, for example ``{"chosen": "preferred"}``.

    Returns:
        N pairs. ``id`` is the row's own as a string, else a hash of the three texts, the same whatever the container.

    Raises:
        DataError: ``ds`` is no such table, has no rows or lacks a column; or rows cannot be used, all of which are
            counted and the first 20 named, from row 0.
    """
    with python_words(HINTS):
        source = _section(columns)
        rows, names = read_table(memory_rows(ds, NAME), source)
    checked = check_rows(rows, names, NAME)
    if checked.problems:
        raise _unusable(checked.problems, len(checked.invalid), len(rows))
    unused = unused_columns(names)
    if unused:
        log.info("%s: columns that are not used: %s", NAME, ", ".join(unused))
    return checked.pairs


def _section(columns: Mapping[str, str] | None) -> PairsSection:
    try:
        return PairsSection(path=NAME, columns=dict(columns or {}))
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise DataError(f"columns: {reason}", code="data-column") from None


def _unusable(problems: Sequence[Problem], count: int, total: int) -> DataError:
    lines = [
        f"row {problem.row}, {problem.column}: found {problem.found}, expected {problem.expected}"
        for problem in problems
    ]
    return DataError(
        f"{NAME}: {count} of {total} rows cannot be used (the first row is row 0):\n{listed(lines)}",
        code=problems[0].code,
        hint="fix these rows, or leave them out: ds.select(...)",
    )
