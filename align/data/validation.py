"""Validation of rows: which are preference pairs, and how the problems of the others are reported."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from align.config.columns import NAMES, NOT_NEGATIVE, NUMBERS, RESPONSES, SCORES, TEMPLATE_COLUMNS, TEXT, THUMB, VALUES
from align.data.implicit_prompt import split_prompt, with_text_prompt, without_prompt
from align.data.messages import content_text, unparsed
from align.data.readers import Row
from align.data.thumbs import thumb_problem
from align.io.console import log

ROLES = ("system", "user", "assistant", "tool")
MAY_BE_EMPTY = frozenset({"system", "tool"})
"""Roles whose content may be empty text; an assistant's may be if the message calls a tool."""
CALLS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message that calls a tool or thinks, whose content may then be empty, None or absent."""
TEMPLATE_KINDS: dict[str, tuple[type, str]] = {
    "tools": (list, "a list of tools"),
    "chat_template_kwargs": (dict, "an object of arguments"),
}
LONGEST_TEXT = 4_000_000
"""Characters per text, at most: about a million tokens. A longer text is a file that is read wrongly."""
INVISIBLE = " \n\t\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""White space and characters without width; a text of these alone is empty."""
LARGEST = 1e38
"""Size of a number, at most: training computes in 32 bits, in which larger ones are infinite."""
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one cell."""

    source: str
    row: int
    column: str
    code: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.source}:row {self.row}:{self.column}: found {self.found}, expected {self.expected}"


class RowReader:
    """Turns raw rows of one source into pairs, or into problems.

    Args:
        source: name of the source, for messages.
        columns: its columns; without ``prompt``, the prompt is the shared beginning of chosen and rejected (trl's
            implicit prompt format; see ``extract_prompt``).
    """

    def __init__(self, source: str, columns: set[str]) -> None:
        self.source = source
        self.implicit = "prompt" not in columns
        self.repeated = False
        self.contradicted = False

    def read(self, row: Row) -> tuple[dict[str, Any] | None, list[Problem]]:
        """(pair or None, problems): a pair comes with problems only if a column other than its texts is invalid."""
        if row.unreadable:
            found, _, expected = row.unreadable.removeprefix("found ").partition(", expected ")
            return None, [Problem(row.file or self.source, row.number, "(row)", "data-row", found, expected)]
        if wrong := thumb_problem(row.values):
            return None, [self.problem(row, wrong[0], "pair-value", *wrong[1:])]
        texts = RESPONSES if self.implicit else TEXT
        problems = [problem for name in texts for problem in self.text(row, name)]
        if problems:
            return None, problems
        values, problems = self._texts(row)
        if problems:
            return None, problems
        pair = {name: values[name] for name in TEXT}
        for name in NUMBERS:
            number, problem = self.number(row, name, values.get(name))
            pair[name] = number
            problems += problem
        for name in TEMPLATE_COLUMNS:
            pair[name], problem = self.template_argument(row, name, values.get(name))
            problems += problem
        rewards = [pair[name] for name in SCORES[:2]]
        if values.get("margin") is None and None not in rewards:
            pair["margin"], problem = self.number(row, "margin", rewards[0] - rewards[1])
            problems += problem
        elif pair["margin"] is not None and None not in rewards:
            self._compare(row, pair["margin"], rewards[0] - rewards[1])
        for name in NAMES:
            pair[name] = None if values.get(name) is None else str(values[name])
            if pair[name] is not None and name in VALUES and pair[name] not in VALUES[name]:
                problems.append(self.problem(row, name, "pair-value", repr(values[name]), " or ".join(VALUES[name])))
        pair["id"] = values.get("id")
        return pair, problems

    def _texts(self, row: Row) -> tuple[dict[str, Any], list[Problem]]:
        """The values of a row with its prompt apart from its responses, and what is wrong with these texts."""
        texts = RESPONSES if self.implicit else TEXT
        values = dict(row.values)
        plain = {name: isinstance(values[name], str) for name in texts}
        if len({plain[name] for name in RESPONSES}) > 1 or (plain["chosen"] and not plain.get("prompt", True)):
            found = ", ".join(f"{name} {'text' if plain[name] else 'messages'}" for name in texts)
            return values, [self.problem(row, "(row)", "pair-mixed", found, "all text or all messages")]
        if values["chosen"] == values["rejected"] and values.get(THUMB) is None:
            return values, [self.problem(row, "rejected", "pair-equal", "the same as chosen", "another response")]
        if self.implicit:
            parts = split_prompt(values)
            if parts is None:
                expected = "chosen and rejected to begin with the same prompt"
                return values, [self.problem(row, "chosen", "pair-no-prompt", "no shared beginning", expected)]
        elif plain["prompt"] and not plain["chosen"]:
            parts = with_text_prompt(values)
            if parts is None:
                found = "a prompt text that the responses do not begin with"
                expected = "it as a user message of both, or responses by assistant alone (or no column prompt)"
                return values, [self.problem(row, "(row)", "pair-mixed", found, expected)]
        else:
            parts = without_prompt(values)
            if parts and not self.repeated:
                log.warning("%s: responses begin with the prompt of their column; it is taken once", self.source)
            self.repeated = self.repeated or bool(parts)
        values |= parts
        cells = replace(row, values=values)
        problems = [problem for name in RESPONSES for problem in self.text(cells, name)] if parts else []
        return values, problems or ([] if plain["chosen"] else self._turns(row, values))

    def text(self, row: Row, name: str) -> list[Problem]:
        """Problems of the cell ``name``, which must be text or a list of messages."""
        value = row.values.get(name)
        if value is None:
            return [self.problem(row, name, "pair-missing", "nothing", "text or a list of messages")]
        if isinstance(value, str):
            if unparsed(value):
                return [self.problem(row, name, "pair-message", repr(value), "messages as JSON")]
            problem = self._characters(row, name, value)
            return [] if problem is None else [problem]
        if not isinstance(value, list):
            return [self.problem(row, name, "pair-type", repr(value), "text or a list of messages")]
        if not value:
            return [self.problem(row, name, "pair-empty", "no messages", "at least one message")]
        for position, message in enumerate(value, 1):
            problem = self._message(row, name, position, message)
            if problem is not None:
                return [problem]
        return []

    def _message(self, row: Row, name: str, position: int, message: Any) -> Problem | None:
        where = f"{name}[{position}]"
        if not isinstance(message, dict) or "role" not in message or ("content" not in message and not calls(message)):
            return self.problem(row, where, "pair-message", repr(message), "{role: ..., content: ...}")
        if message["role"] not in ROLES:
            return self.problem(row, where, "pair-role", f"role {message['role']!r}", f"one of {', '.join(ROLES)}")
        content = message.get("content")
        if not content and may_be_empty(message):
            return None
        if isinstance(content, list):
            wrong = wrong_part(content)
            if wrong:
                return self.problem(row, where, "pair-message", *wrong)
        elif not isinstance(content, str):
            return self.problem(row, where, "pair-message", f"content {content!r}", "text, or parts with text")
        return self._characters(row, where, content_text(content))

    def _characters(self, row: Row, name: str, text: str) -> Problem | None:
        """A problem of a text: nothing that is seen, millions of characters, a null character, a lone surrogate."""
        if not text.strip().strip(INVISIBLE):
            return self.problem(row, name, "pair-empty", "empty text", "non-empty text")
        if len(text) > LONGEST_TEXT:
            expected = f"at most {LONGEST_TEXT:,} (an unclosed quote swallows a file)"
            return self.problem(row, name, "pair-text", f"{len(text):,} characters", expected)
        odd = odd_character(text)
        return None if odd is None else self.problem(row, name, "pair-text", odd, "valid Unicode text")

    def _turns(self, row: Row, values: dict[str, Any]) -> list[Problem]:
        problems = []
        if values["prompt"][-1]["role"] == "assistant":
            problems.append(
                self.problem(row, "prompt", "pair-role", "a last message by assistant", "one by user or tool")
            )
        for name in RESPONSES:
            first, role = (values[name][place]["role"] for place in (0, -1))
            if role != "assistant":
                problems.append(self.problem(row, name, "pair-role", f"a last message by {role}", "one by assistant"))
            elif first in ("system", "user"):
                expected = "one by assistant or tool (the messages before it belong to the prompt)"
                problems.append(self.problem(row, name, "pair-role", f"a first message by {first}", expected))
        return problems

    def number(self, row: Row, name: str, value: Any) -> tuple[float | None, list[Problem]]:
        if value is None:
            return None, []
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            return None, [self.problem(row, name, "pair-number", repr(value), "a finite number")]
        if abs(number) > LARGEST:
            return None, [self.problem(row, name, "pair-number", repr(value), f"at most {LARGEST:.1g} in size")]
        if number < 0 and name in NOT_NEGATIVE:
            return None, [self.problem(row, name, "pair-number", repr(value), "a number that is not negative")]
        return number, []

    def _compare(self, row: Row, margin: float, difference: float) -> None:
        """Log, once for a source, that a margin has another sign than the difference of its rewards."""
        if margin * difference < 0 and not self.contradicted:
            self.contradicted = True
            log.warning("%s:row %d, and perhaps others: margin is %g, but reward_chosen - reward_rejected is %g; the "
                        "margin is used (are two columns swapped?)", row.file or self.source, row.number, margin,
                        difference)  # fmt: skip

    def template_argument(self, row: Row, name: str, value: Any) -> tuple[str | None, list[Problem]]:
        """An argument of the chat template as JSON; its source may have it as JSON text."""
        text, expected = argument_text(name, value)
        return text, [self.problem(row, name, "pair-type", repr(value), expected)] if expected else []

    def problem(self, row: Row, column: str, code: str, found: str, expected: str) -> Problem:
        if len(found) > SHOWN_CHARACTERS:
            found = found[:SHOWN_CHARACTERS] + "..."
        return Problem(row.file or self.source, row.number, column, code, found, expected)


def argument_text(name: str, value: Any) -> tuple[str | None, str]:
    """Return an argument of the chat template as JSON, and what was expected; the latter is empty if it is one.

    Args:
        name: one of ``TEMPLATE_COLUMNS``.
        value: its cell, as a value or as JSON text; None for no argument.
    """
    if value is None:
        return None, ""
    kind, expected = TEMPLATE_KINDS[name]
    try:
        found: Any = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(found, ensure_ascii=False)
    except (ValueError, TypeError):
        return None, expected
    return (text, "") if isinstance(found, kind) else (None, expected)


def calls(message: dict[str, Any]) -> bool:
    """Whether a message is an assistant's that calls a tool or thinks."""
    return message.get("role") == "assistant" and any(message.get(key) for key in CALLS)


def may_be_empty(message: dict[str, Any]) -> bool:
    """Whether a message needs no content: it calls a tool or thinks, or is an empty system message or result."""
    return calls(message) or (message.get("role") in MAY_BE_EMPTY and message.get("content") == "")


def wrong_part(parts: list[Any]) -> tuple[str, str] | None:
    """(what was found, what was expected) of the first content part that is no text; None if all are."""
    if not parts:
        return "no parts as content", "at least one part"
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            return f"the content part {part!r}", '{type: text, text: "..."}'
    return None


def odd_character(text: str) -> str | None:
    """The first null character or lone surrogate of a text with its position; None if there is none."""
    for position, character in enumerate(text, 1) if _has_odd(text) else ():
        if character == "\0" or "\ud800" <= character <= "\udfff":
            kind = "a null character" if character == "\0" else f"a lone surrogate ({character!r})"
            return f"{kind} at position {position}"
    return None


def _has_odd(text: str) -> bool:
    try:
        return b"\0" in text.encode()
    except UnicodeEncodeError:
        return True
