"""Reading a file of completions, grouped by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from align.config import PairsSection
from align.config.columns import FINISH_REASONS, TEMPLATE_COLUMNS
from align.data.messages import text_array, with_arguments
from align.data.readers import Row, read_rows
from align.data.user_columns import user_array, user_cells
from align.data.validation import RowReader
from align.errors import DataError, listed

REQUIRED = ("id", "prompt", "completion")
ALLOWED = frozenset({"pair-empty", "pair-text"})
"""Codes of problems that are allowed in completions, though not in the responses of a pair."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion of a prompt."""

    sample: int
    """Number among the prompt's completions; the position in the file if the row gives none."""
    completion: Any
    row: dict[str, Any]
    """All columns of its row."""
    own: dict[str, Any]
    """Those that the program neither reads nor writes, unchanged."""

    @property
    def finish_reason(self) -> str | None:
        """One of ``FINISH_REASONS``; None if the row does not give it."""
        found = self.row.get("finish_reason")
        return None if found is None else str(found)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and all its completions."""

    id: str
    prompt: Any
    """Text or messages, perhaps ``with_arguments``."""
    group: str | None
    candidates: list[Candidate]


def read_groups(file: str | Path) -> list[Group]:
    """The completions in a file that ``align generate`` wrote, by prompt, in the order of the file.

    Raises:
        DataError: the file cannot be read or is empty, or rows are invalid (the first 20 and a count).
    """
    rows = read_rows(PairsSection(path=str(file)))
    if not rows:
        raise DataError(f"{file}: holds no rows", code="data-empty", hint="expected one completion per row")
    reader = RowReader(str(file), {"prompt"})
    problems: list[str] = []
    groups: dict[str, Group] = {}
    names = user_cells(row.values for row in rows)
    for row in rows:
        problem = row.unreadable or _wrong(row, reader)
        if not problem:
            key, prompt = str(row.values["id"]), with_arguments(row.values["prompt"], row.values)
            group = groups.setdefault(key, Group(key, prompt, row.values.get("group"), []))
            own = row.values.get("sample")
            number = len(group.candidates) if own is None else int(own)
            if prompt != group.prompt:
                problem = f"found another prompt than in the rows before with id {key!r}"
            elif any(number == earlier.sample for earlier in group.candidates):
                problem = f"found sample {number} of {key!r} again, expected each number once"
            else:
                cells = {name: row.raw.get(name) for name in names}
                group.candidates.append(Candidate(number, row.values["completion"], row.values | cells, cells))
        if problem:
            problems.append(f"{row.file and row.file + ':'}row {row.number}: {problem}")
    if problems:
        raise DataError(
            f"{file}: {len(problems)} rows cannot be used:\n{listed(problems)}",
            code="completion-row",
            hint="expected rows as `align generate` writes them: id, prompt, sample, completion",
        )
    return list(groups.values())


def completion_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of completions as Arrow: every message with the keys that its row gives it, the user's columns unchanged."""
    names = dict.fromkeys(name for row in rows for name in row)
    own = user_cells(rows)
    make = dict.fromkeys(("prompt", "completion"), text_array) | dict.fromkeys(own, user_array)
    return pa.table({name: make.get(name, pa.array)([row.get(name) for row in rows]) for name in names})


def _wrong(row: Row, reader: RowReader) -> str:
    """What is wrong with a row of completions; empty if it is valid."""
    missing = [name for name in REQUIRED if row.values.get(name) is None]
    if missing:
        return f"found no {', '.join(missing)}"
    found = [
        problem
        for name in ("prompt", "completion")
        for problem in reader.text(row, name)
        if name == "prompt" or problem.code not in ALLOWED
    ]
    if found:
        return f"{found[0].column}: found {found[0].found}, expected {found[0].expected}"
    if isinstance(row.values["prompt"], str) != isinstance(row.values["completion"], str):
        return "found both text and messages, expected prompt and completion of one kind"
    for name in TEMPLATE_COLUMNS:
        for problem in reader.template_argument(row, name, row.values.get(name))[1]:
            return f"{name}: found {problem.found}, expected {problem.expected}"
    sample = row.values.get("sample")
    if sample is not None and not (isinstance(sample, int | str) and str(sample).isdecimal()):
        return f"sample: found {sample!r}, expected a number from 0 up"
    reason = row.values.get("finish_reason")
    if reason is not None and reason not in FINISH_REASONS:
        return f"finish_reason: found {reason!r}, expected {' or '.join(FINISH_REASONS)}"
    return ""
