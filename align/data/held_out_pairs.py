"""Held-out pairs for measurements: answers without a counterpart, overlap with the training pairs, groups."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import PairsSection
from align.data.overlap import trained_on
from align.data.pairs import check_rows, unusable
from align.data.readers import Row, read_files, read_table
from align.errors import DataError

ANSWERS = ("response", "chosen", "completion")
"""Columns that may hold the answer of a row, in this order."""
POOLED = "groups of one"
"""Group of the pairs that are alone in theirs."""
WHOLE = "all"
"""Group of all held-out pairs."""
NAMED = 5


def read_answers(source: PairsSection) -> Dataset:
    """Rows of prompts and answers as pairs whose rejected response is a placeholder, for losses of the answer alone.

    Args:
        source: files with ``prompt`` and one of ``ANSWERS``.

    Raises:
        DataError: a file is missing or holds no answers, or a row cannot be used.
    """
    rows = read_files(source.path)
    names = set().union(*(row.values for row in rows)) if rows else set()
    given = source.columns.get("chosen") or next((name for name in ANSWERS if name in names), None)
    if rows and given not in names:
        raise DataError(
            f"{source.path}: found the columns {', '.join(sorted(names)) or 'none'}, expected one of the answer: "
            f"{', '.join(ANSWERS)}",
            code="data-column",
            hint="map it: --held-out-column chosen=answer",
        )
    columns = {wanted: name for wanted, name in source.columns.items() if wanted != "rejected"} | {"chosen": str(given)}
    made = [replace(row, values=row.values | {"rejected": _placeholder(row, str(given))}) for row in rows]
    checked = check_rows(*read_table(made, source.model_copy(update={"columns": columns})), source.path)
    if checked.problems:
        raise unusable(source.path, checked.problems, len(checked.invalid))
    return checked.pairs


def _placeholder(row: Row, answer: str) -> Any:
    """A response of the answer's kind, another than the answer; it begins with the answer's white space.

    So the prompt ends at the same token as in a pair of two real responses.
    """
    value = row.values.get(answer)
    if isinstance(value, list):
        last = value[-1].get("content") if value and isinstance(value[-1], dict) else None
        return [{"role": "assistant", "content": "-" if last == "." else "."}]
    text = str(value)
    return text[: len(text) - len(text.lstrip())] + ("-" if text.strip() == "." else ".")


def distinct(held: Dataset, pairs: Dataset, source: str) -> tuple[Dataset, list[str]]:
    """The held-out pairs that are not trained on, and a line that tells which are.

    Raises:
        DataError: all are trained on.
    """
    same = trained_on(held, pairs)
    if not same.any():
        return held, []
    names = [str(held[int(k)]["id"]) for k in np.flatnonzero(same)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    found = f"{source}: {len(names)} of {len(held)} held-out pairs are training pairs as well"
    if same.all():
        raise DataError(
            f"{found}, expected some that are not",
            code="influence-overlap",
            hint="hold pairs out of the training pairs, or give other ones",
        )
    return held.select(np.flatnonzero(~same)), [f"{found}, left out: {', '.join(names[:NAMED])}{more}"]


def groups_of(held: Dataset) -> tuple[list[str], list[str]]:
    """The group of each held-out pair, and a line that tells which groups were put together.

    A group of a single pair is measured together with the other such groups: its influence would be that of one text.
    """
    if "group" not in held.column_names:
        return [WHOLE] * len(held), []
    names = ["none" if name is None else str(name) for name in held["group"]]
    names = [f"group {name}" if name == WHOLE else name for name in names]
    counts = Counter(names)
    single = [name for name, count in counts.items() if count == 1]
    if len(counts) == 1 or not single:
        return ([WHOLE] * len(held) if len(counts) == 1 else names), []
    found = [POOLED if counts[name] == 1 else name for name in names]
    shown = ", ".join(single[:NAMED]) + (f" and {len(single) - NAMED} more" if len(single) > NAMED else "")
    line = f"held-out groups of a single pair, measured together as {POOLED!r}: {shown}"
    return ([WHOLE] * len(held) if set(found) == {POOLED} else found), [line]
