"""Prompts to complete, from a file or dataset."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from align.config import PairsSection
from align.config.columns import TEMPLATE_COLUMNS
from align.data.readers import Row, read_files, read_rows
from align.data.sampling import fair_sample, report_sample
from align.data.seen_ids import SeenIds, content_id
from align.data.validation import ROLES, RowReader, may_be_empty, odd_character
from align.errors import DataError, listed
from align.io.console import log


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt to complete."""

    id: str
    prompt: Any
    """Text, or messages of which the last is not by the assistant."""
    group: str | None
    """A category; the completions keep it."""


def read_prompts(source: PairsSection) -> list[PromptRow]:
    """The ``prompt`` of every row of a JSONL, CSV or Parquet file, a saved dataset or a hub dataset.

    ``id`` is the row's own, or a hash of the prompt (see ``content_id``). Columns other than ``id``, ``prompt`` and
    ``group`` are not read, so a pair table is a valid source. With ``source.limit``, a fair sample of the rows.

    Raises:
        DataError: the source cannot be read, or rows have no valid prompt (the first 20 and a count).
    """
    rows = read_rows(source)
    _warn_of_arguments(source.path, rows)
    renamed = source.columns.get("prompt", "prompt")
    if not rows:
        raise DataError(f"{source.path}: holds no rows", code="data-empty", hint="expected one prompt per row")
    problems: list[str] = []
    prompts: list[PromptRow] = []
    seen = SeenIds()
    for row in rows:
        problem = row.unreadable or _wrong(row.values.get(renamed))
        if not problem and prompts and isinstance(prompts[0].prompt, str) != isinstance(row.values[renamed], str):
            problem = "found both text and messages, expected one kind per file"
        own = row.values.get("id")
        key = str(own) if own is not None or problem else content_id(row.values[renamed], seen)
        if not problem and (earlier := seen.get(key)) is not None:
            problem = f"found id {key!r}, which row {earlier} has too, expected an id used once"
        if problem:
            problems.append(f"{row.file and row.file + ':'}row {row.number}: {problem}")
            continue
        seen.add(key, row.number)
        prompts.append(PromptRow(key, row.values[renamed], _group(row)))
    if problems:
        raise DataError(
            f"{source.path}: {len(problems)} rows have no usable prompt:\n{listed(problems)}",
            code="prompt-row",
            hint='expected {"prompt": text or messages} per row; name another column with --column prompt=NAME',
        )
    if source.limit is None:
        return prompts
    drawn, total = fair_sample((row.id for row in prompts), source.limit)
    report_sample(source.path, len(drawn), total, "prompts")
    return [prompts[k] for k in drawn]


def _wrong(prompt: Any) -> str:
    """What is wrong with a prompt; empty if it is valid."""
    if isinstance(prompt, str):
        if odd := odd_character(prompt):
            return f"found {odd}, expected valid Unicode text"
        return "" if prompt.strip() else "found an empty prompt, expected text"
    if not isinstance(prompt, list) or not prompt:
        return f"prompt: found {prompt!r}, expected text or a list of messages"
    for turn in prompt:
        if isinstance(turn, dict) and not turn.get("content") and may_be_empty(turn):
            continue
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            return f"prompt: found {str(turn)[:80]}, expected {{role: {' or '.join(ROLES)}, content: text}}"
        if odd := odd_character(turn["content"]):
            return f"prompt: found {odd}, expected valid Unicode text"
    if prompt[-1]["role"] == "assistant":
        return "prompt: found a last message by assistant, expected one by user or tool"
    return ""


def _warn_of_arguments(source: str, rows: Iterable[Row]) -> None:
    """Log that arguments of the chat template, which a pair may have, are not read with a prompt."""
    found = [name for name in TEMPLATE_COLUMNS if any(row.values.get(name) is not None for row in rows)]
    if found:
        log.warning("%s: %s is not used: prompts are completed without it", source, " and ".join(found))


def _group(row: Row) -> str | None:
    group = row.values.get("group")
    return None if group is None else str(group)


def load_prompts(source: str) -> list[Any]:
    """The ``prompt`` of every row of one or several JSONL, CSV or Parquet files: text, or a list of messages.

    Raises:
        DataError: a file is missing or empty, or a row has no valid prompt.
    """
    rows = read_files(source)
    _warn_of_arguments(source, rows)
    for row in rows:
        if row.unreadable:
            raise DataError(f"{row.file or source}:row {row.number}: {row.unreadable}", code="data-row")
    reader = RowReader(source, {"prompt"})
    problems = [problem for row in rows for problem in reader.text(row, "prompt")]
    if problems:
        raise DataError(f"{source}:\n{listed([str(problem) for problem in problems])}", code="prompt-row")
    if not rows:
        raise DataError(f"{source}: holds no rows", code="data-empty", hint="expected one prompt per row")
    return [row.values["prompt"] for row in rows]


def sample_prompts(source: str, limit: int | None) -> tuple[list[Any], int]:
    """A fair sample of at most ``limit`` prompts of ``load_prompts``, and how many there are; None: all of them.

    Raises:
        DataError: see ``load_prompts``.
    """
    prompts = load_prompts(source)
    if limit is None:
        return prompts, len(prompts)
    seen, names = SeenIds(), []
    for number, prompt in enumerate(prompts, 1):
        names.append(content_id(prompt, seen))
        seen.add(names[-1], number)
    drawn, total = fair_sample(names, limit)
    report_sample(source, len(drawn), total, "prompts")
    return [prompts[k] for k in drawn], total
