"""The tables of a trainer: from what a caller has in memory to tokenized pairs with their weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt

from align.config.columns import (
    FINISH_COLUMNS,
    FINISH_REASONS,
    ID_COLUMNS,
    MASK_COLUMNS,
    NOT_NEGATIVE,
    PAIR_COLUMNS,
    REFERENCE_COLUMNS,
    RESPONSES,
    TEMPLATE_COLUMNS,
    TEXT,
)
from align.data.messages import exact_messages
from align.data.pair_chunks import one_type
from align.data.thumbs import thumb_table
from align.data.validation import argument_text
from align.errors import DataError
from align.io.console import log
from align.models.collator import REAL, ROW
from align.models.tokenization import encode_table
from align.models.turn_end import report_no_end
from align.models.turns import Turns, counted
from align.training.columns import NO_TOKEN, told_apart

WRITTEN = (ROW, REAL, "trust", "label_share", *ID_COLUMNS, *MASK_COLUMNS, *REFERENCE_COLUMNS)
"""Columns that the trainer writes itself; those of a given table are dropped."""
IMAGES = ("image", "images")
TABLES = "a datasets.Dataset, a list of dicts or a pandas.DataFrame"
STREAMED = 256
"""Rows that are taken from a stream at a time, at least."""
NUMERIC = frozenset(
    ["null", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
     "float16", "float32", "float64"]
)  # fmt: skip
"""dtypes of columns that hold one number per pair."""


def as_table(given: Any, name: str) -> Dataset | IterableDataset:
    """A table of pairs in memory as a Dataset; a stream stays one.

    Args:
        given: Dataset, IterableDataset, list of dicts or pandas.DataFrame (NaN is a missing value).
        name: argument of the trainer, for messages.

    Raises:
        DataError: it is something else, has no rows or lacks a column.
    """
    if isinstance(given, Dataset):
        table = (
            given if given.format["type"] == "custom" else given.with_format(None)
        )  # tensors do not compare as lists
    elif isinstance(given, IterableDataset):
        table = given
    elif isinstance(given, pd.DataFrame):
        if twice := [str(column) for column in given.columns[given.columns.duplicated()]]:
            raise DataError(f"{name}: column {twice[0]!r} is there twice", code="data-column")
        with one_type(name, "(rows)"):
            table = Dataset.from_pandas(given, preserve_index=False)
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        wrong = next((k for k, row in enumerate(given) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise DataError(
                f"{name}: row {wrong} is a {type(given[wrong]).__name__}, expected a dict", code="data-type"
            )
        columns = list(
            dict.fromkeys(column for row in given for column in row)
        )  # from_list reads those of the first row
        with one_type(name, "(rows)"):
            table = Dataset.from_list([{column: row.get(column) for column in columns} for row in given])
    else:
        raise _wrong_type(given, name)
    if isinstance(table, Dataset):
        table = thumb_table(table, name)
        check_columns(table, name)
        table = exact_messages(table)
        table = table.remove_columns([column for column in WRITTEN if column in table.column_names])
    return table


def tables_of(given: Any, name: str) -> Any:
    """``as_table`` of one table or, as trl takes it for evaluation, of a dict of them; None stays None."""
    if given is None:
        return None
    if isinstance(given, dict):  # DatasetDict is one
        return {key: as_table(table, f"{name}[{key!r}]") for key, table in given.items()}
    return as_table(given, name)


def check_columns(table: Dataset, name: str) -> None:
    """Raise if a table cannot be one of pairs.

    Raises:
        DataError: no rows, a missing column, images, a cell that is no text or number of a pair.
    """
    columns = table.column_names
    if not len(table):
        raise DataError(f"{name}: found no rows, expected pairs", code="data-empty")
    missing = [column for column in RESPONSES if column not in columns]
    if missing:
        raise DataError(
            f"{name}: found the columns {', '.join(columns)}, expected also {' and '.join(missing)}",
            code="data-column",
            hint=f'rename the column that holds it: Dataset.rename_column("...", "{missing[0]}")',
        )
    if any(column in columns for column in IMAGES):
        raise DataError(f"{name}: found images, expected text or messages", code="data-column", hint="train with trl")
    for column in TEXT:
        if column in columns:
            _check_texts(table, name, column)
    for column in TEMPLATE_COLUMNS:
        for k, cell in enumerate(table[column] if column in columns else []):
            if expected := argument_text(column, cell)[1]:
                raise DataError(
                    f"{name}: {column} of row {k}: found {cell!r:.60}, expected {expected}", code="pair-type"
                )
    for column in PAIR_COLUMNS:
        if column in columns:
            _check_numbers(table, name, column)
    for column in FINISH_COLUMNS.values():
        for k, value in enumerate(table[column] if column in columns else []):
            if value is not None and value not in FINISH_REASONS:
                raise DataError(
                    f"{name}: {column} of row {k}: found {value!r:.60}, expected {' or '.join(FINISH_REASONS)}",
                    code="pair-value",
                    hint="a response that a limit of tokens cut off is length, any other stop or None",
                )


def _check_texts(table: Dataset, name: str, column: str) -> None:
    for k, value in enumerate(table[column]):
        if not isinstance(value, str | list):
            raise DataError(
                f"{name}: {column} of row {k}: found {value!r:.60}, expected text or a list of messages",
                code="pair-missing" if value is None else "pair-type",
                hint="fix these rows, or leave them out: Dataset.filter",
            )


def _check_numbers(table: Dataset, name: str, column: str) -> None:
    kind = getattr(table.features[column], "dtype", None)
    if kind not in NUMERIC:
        raise DataError(
            f"{name}: the column {column} holds {kind or 'lists'}, expected a number for each pair",
            code="data-column",
            hint=f"convert it, or remove it if it is not the {column} of a pair",
        )
    values = np.asarray(table[column], dtype=np.float64)
    wrong = np.flatnonzero(np.isinf(values) | ((values < 0) & (column in NOT_NEGATIVE)))
    if len(wrong):
        expected = "a finite number" + (" of at least 0" if column in NOT_NEGATIVE else "")
        raise DataError(
            f"{name}: {column} of row {wrong[0]}: found {values[wrong[0]]}, expected {expected}", code="pair-number"
        )


def stream_table(stream: IterableDataset, pairs: int, keep: Callable[[Dataset, str], Dataset]) -> Dataset:
    """The first ``pairs`` pairs of a stream that ``keep`` keeps; fewer if it ends.

    ``keep`` gets a part of the stream, and the name of that part for messages.

    Raises:
        DataError: see ``as_table``.
    """
    rows: Iterator[dict[str, Any]] = iter(stream)
    parts: list[Dataset] = []
    missing, seen = pairs, 0
    while missing > 0 and (taken := list(islice(rows, max(missing, STREAMED)))):
        name = f"train_dataset, from row {seen} of the stream on" if seen else "train_dataset"
        parts.append(keep(as_table(taken, name), name))
        missing -= len(parts[-1])
        seen += len(taken)
    if not parts:
        raise DataError("train_dataset: the stream has no rows, expected pairs", code="data-empty")
    table = concatenate_datasets(parts)
    return table.select(range(min(pairs, len(table))))


def tokenize_table(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    ids: Sequence[str],
    turns: Turns = "assistant",
    *,
    single: bool = False,
) -> Dataset:
    """Tokenize the table, and drop pairs of which ``max_length`` leaves nothing that counts; log how many.

    Pairs whose responses became the same tokens are left out as well, see ``told_apart``.

    Args:
        dataset: pairs; with the column ``ROW``, the id of row r is ``ids[r]``.
        tokenizer: of the policy.
        args: ``max_length``, ``truncation_mode`` and ``dataset_num_proc`` of DPOConfig.
        ids: names of pairs in messages.
        turns: whose words count in responses of several messages.
        single: the rows are single responses with thumbs.

    Raises:
        DataError: no pair is left.
    """
    if "prompt" not in dataset.column_names:
        dataset = dataset.map(extract_prompt)
        if empty := sum(not prompt for prompt in dataset["prompt"]):
            log.warning("prompt: found no such column, and the responses of %d of %d pairs have no common beginning: "
                        "they are trained without a prompt", empty, len(dataset))  # fmt: skip
    if len(dataset) and not isinstance(dataset[0]["prompt"], str):
        report_no_end(tokenizer)
    prepared = encode_table(dataset, tokenizer, turns=turns, processes=args.dataset_num_proc)
    read = prepared.select_columns([n for n in (*ID_COLUMNS, *MASK_COLUMNS) if n in prepared.column_names])
    left = [k for k, row in enumerate(read) if counted(row, args.max_length, args.truncation_mode)]
    prepared = prepared if len(left) == len(prepared) else prepared.select(left)
    missing = len(dataset) - len(prepared)
    if missing == len(dataset):
        raise DataError(
            f"none of {missing} pairs has a token of a response within max_length",
            code="empty-completion",
            hint="raise train.trainer.max_length",
        )
    if missing:
        log.warning("%d of %d pairs are left out: " + NO_TOKEN, missing, len(dataset))
    if single:
        return prepared
    kept = told_apart(prepared, ids, args.max_length, args.truncation_mode)
    return prepared if len(kept) == len(prepared) else prepared.select(kept)


def _wrong_type(given: Any, name: str) -> DataError:
    hint = "datasets.Dataset.from_list, from_dict and from_pandas make one"
    kind = type(given).__name__
    found = "nothing" if given is None else f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
    if isinstance(given, DatasetDict | IterableDatasetDict):
        found, hint = f"{found} of the splits {', '.join(given)}", f"choose one: {name}[{next(iter(given), 'train')!r}]"
    elif isinstance(given, str | bytes):
        hint = 'datasets.load_dataset("json", data_files=...)["train"] reads a file'
    return DataError(f"{name}: found {found}, expected {TABLES}", code="data-type", hint=hint)
