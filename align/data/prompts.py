"""Prompts to complete, from a file or dataset."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from align.config import PairsSection
from align.config.columns import TEMPLATE_COLUMNS, TEMPLATE_KWARGS
from align.config.decoding import DecodingSection
from align.data.messages import content_text, split_arguments, with_arguments
from align.data.readers import Row, read_files, read_rows
from align.data.sampling import fair_sample, report_sample
from align.data.seen_ids import SeenIds, content_id
from align.data.user_columns import user_cells
from align.data.validation import ROLES, RowReader, may_be_empty, odd_character, wrong_part
from align.errors import ConfigError, DataError, listed
from align.io.console import log


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt to complete."""

    id: str
    prompt: Any
    """Text, or messages of which the last is not by the assistant, perhaps ``with_arguments``."""
    group: str | None
    """A category; the completions keep it."""
    own: dict[str, Any] = field(default_factory=dict)
    """Columns of the source that the program does not read; the completions keep them."""

    @property
    def made_from(self) -> dict[str, Any]:
        """The part of a stage's key that this prompt is."""
        found: dict[str, Any] = {"id": self.id, "prompt": self.prompt, "group": self.group}
        return found | ({"own": self.own} if self.own else {})


def read_prompts(source: PairsSection, kwargs: Mapping[str, Any] | None = None) -> list[PromptRow]:
    """The ``prompt`` of every row of a JSONL, CSV or Parquet file, a saved dataset or a hub dataset.

    ``id`` is the row's own, or a hash of the prompt (see ``content_id``). ``tools`` and ``chat_template_kwargs`` of a
    row go with its messages, as in training. The other columns of a pair table are not read, so one is a valid source;
    the user's own columns are carried. With ``source.limit``, a fair sample of the rows.

    Args:
        source: the prompts.
        kwargs: ``chat_template_kwargs`` of every prompt; those of a row come first.

    Raises:
        ConfigError: ``kwargs`` for plain text.
        DataError: the source cannot be read, or rows have no valid prompt (the first 20 and a count).
    """
    rows = read_rows(source)
    reader = RowReader(source.path, {"prompt"})
    if not rows:
        raise DataError(f"{source.path}: holds no rows", code="data-empty", hint="expected one prompt per row")
    problems: list[str] = []
    prompts: list[PromptRow] = []
    seen, own = SeenIds(), user_cells(row.values for row in rows)
    for row in rows:
        problem = row.unreadable or _wrong(row.values.get("prompt"))
        if not problem and prompts and isinstance(prompts[0].prompt, str) != isinstance(row.values["prompt"], str):
            problem = "found both text and messages, expected one kind per file"
        arguments, wrong = ({}, "") if problem else _arguments(reader, row, kwargs)
        problem = problem or wrong
        given = row.values.get("id")
        key = str(given) if given is not None or problem else content_id(row.values["prompt"], seen)
        if not problem and (earlier := seen.get(key)) is not None:
            problem = f"found id {key!r}, which row {earlier} has too, expected an id used once"
        if problem:
            problems.append(f"{row.file and row.file + ':'}row {row.number}: {problem}")
            continue
        seen.add(key, row.number)
        cells = {name: row.raw.get(name) for name in own}
        prompts.append(PromptRow(key, with_arguments(row.values["prompt"], arguments), _group(row), cells))
    if problems:
        raise DataError(
            f"{source.path}: {len(problems)} rows have no usable prompt:\n{listed(problems)}",
            code="prompt-row",
            hint='expected {"prompt": text or messages} per row; name another column with --column prompt=NAME',
        )
    if isinstance(prompts[0].prompt, str):
        _no_arguments(source.path, rows, kwargs)
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
        content = turn.get("content") if isinstance(turn, dict) else None
        parts = isinstance(content, list) and wrong_part(content) is None
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not (isinstance(content, str) or parts):
            return f"prompt: found {str(turn)[:80]}, expected {{role: {' or '.join(ROLES)}, content: text}}"
        if odd := odd_character(content_text(content)):
            return f"prompt: found {odd}, expected valid Unicode text"
    if prompt[-1]["role"] == "assistant":
        return "prompt: found a last message by assistant, expected one by user or tool"
    return ""


def _arguments(reader: RowReader, row: Row, kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The arguments that a row gives its chat template, over ``kwargs``, and what is wrong with them, if anything."""
    found: dict[str, Any] = {}
    for name in TEMPLATE_COLUMNS:
        text, problems = reader.template_argument(row, name, row.values.get(name))
        if problems:
            return {}, f"{name}: found {problems[0].found}, expected {problems[0].expected}"
        if text is not None:
            found[name] = json.loads(text)
    own = {key: value for key, value in found.get(TEMPLATE_KWARGS, {}).items() if value is not None}
    return found | {TEMPLATE_KWARGS: {**(kwargs or {}), **own}}, ""


def _no_arguments(source: str, rows: Iterable[Row], kwargs: Mapping[str, Any] | None) -> None:
    """Say that arguments of the chat template have no effect on plain text.

    Raises:
        ConfigError: they are given for all prompts.
    """
    if kwargs:
        raise ConfigError(
            f"chat_template_kwargs: found {dict(kwargs)}, but the prompts of {source} are plain text, which no chat "
            "template renders",
            code="config-option",
            hint="leave them out, or give prompts as messages",
        )
    found = [name for name in TEMPLATE_COLUMNS if any(row.values.get(name) is not None for row in rows)]
    if found:
        log.warning("%s: %s: without effect, since its prompts are plain text", source, " and ".join(found))


def _group(row: Row) -> str | None:
    group = row.values.get("group")
    return None if group is None else str(group)


def load_prompts(source: str, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    """The ``prompt`` of every row of one or several JSONL, CSV or Parquet files, perhaps ``with_arguments``.

    Args:
        source: the files.
        kwargs: ``chat_template_kwargs`` of every prompt; those of a row come first.

    Raises:
        ConfigError: ``kwargs`` for plain text.
        DataError: a file is missing or empty, or a row has no valid prompt.
    """
    rows = read_files(source)
    for row in rows:
        if row.unreadable:
            raise DataError(f"{row.file or source}:row {row.number}: {row.unreadable}", code="data-row")
    reader = RowReader(source, {"prompt"})
    problems, prompts = [], []
    for row in rows:
        problems += [str(problem) for problem in reader.text(row, "prompt")]
        arguments, wrong = _arguments(reader, row, kwargs)
        problems += [f"{row.file or source}:row {row.number}: {wrong}"] if wrong else []
        prompts.append(with_arguments(row.values.get("prompt"), arguments))
    if problems:
        raise DataError(f"{source}:\n{listed(problems)}", code="prompt-row")
    if not rows:
        raise DataError(f"{source}: holds no rows", code="data-empty", hint="expected one prompt per row")
    if all(isinstance(prompt, str) for prompt in prompts):
        _no_arguments(source, rows, kwargs)
    return prompts


def section_prompts(section: DecodingSection) -> list[Any]:
    """The prompts of a section of a run, with its system prompt and its arguments of the chat template.

    Raises:
        ConfigError: ``system_prompt`` or ``chat_template_kwargs`` for plain text.
        DataError: see ``load_prompts``.
    """
    prompts = load_prompts(section.prompts, section.chat_template_kwargs)
    return prompts if section.system_prompt is None else with_system(prompts, section.system_prompt, section.prompts)


def prompt_cells(source: str) -> list[dict[str, Any]]:
    """What the rows of ``load_prompts`` have beside their prompts: ``group`` and the user's own columns, in its order.

    A row's ``id`` is the user's here, ``prompt_id``: the pairs of a run have ids of their own.
    """
    rows = read_files(source)
    own = user_cells(row.values for row in rows)
    found = []
    for row in rows:
        cells = {"prompt_id": row.values["id"]} if row.values.get("id") is not None else {}
        group = _group(row)
        cells |= {} if group is None else {"group": group}
        found.append(cells | {name: row.raw.get(name) for name in own})
    return found


def with_system(prompts: list[Any], text: str, source: str) -> list[Any]:
    """The prompts, each that has no system message after one with this text.

    Raises:
        ConfigError: a prompt is plain text.
    """
    made = []
    for prompt in prompts:
        messages, arguments = split_arguments(prompt)
        if isinstance(messages, str):
            raise ConfigError(
                f"system_prompt: found plain text in {source}, expected messages",
                code="config-option",
                hint="write it into the text, or give prompts as messages",
            )
        own = messages[0]["role"] in ("system", "developer")
        made.append(with_arguments(messages if own else [{"role": "system", "content": text}, *messages], arguments))
    return made


def rows_with_system(rows: list[PromptRow], text: str | None, source: str) -> list[PromptRow]:
    """``with_system`` of prompts to complete; None: as they are."""
    if text is None:
        return rows
    prompts = with_system([row.prompt for row in rows], text, source)
    return [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)]


def draw_prompts(source: str, limit: int | None, kwargs: Mapping[str, Any] | None = None) -> tuple[list[Any], int]:
    """A fair sample of at most ``limit`` prompts of ``load_prompts``, and how many there are; None: all of them.

    Raises:
        DataError: see ``load_prompts``.
    """
    prompts = load_prompts(source, kwargs)
    if limit is None:
        return prompts, len(prompts)
    seen, names = SeenIds(), []
    for number, prompt in enumerate(prompts, 1):
        names.append(content_id(split_arguments(prompt)[0], seen))
        seen.add(names[-1], number)
    drawn, total = fair_sample(names, limit)
    report_sample(source, len(drawn), total, "prompts")
    return [prompts[k] for k in drawn], total
