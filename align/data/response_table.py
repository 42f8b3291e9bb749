"""One table of responses: a prompt, K responses, and whatever people or judges said about each of them.

Pairs, lists and thumbs are views of it (align/data/response_views.py). ``read_responses`` reads five shapes of rows:
its own, one row per response, UltraFeedback's lists, HelpSteer's attributes, and battles of two models.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from align.config import PairsSection
from align.config.columns import TEMPLATE_COLUMNS
from align.data.messages import as_messages, with_arguments
from align.data.readers import Row, read_rows
from align.data.seen_ids import SeenIds, content_id
from align.data.text import plain
from align.data.validation import Problem, RowReader
from align.errors import ConfigError, DataError, listed

Shape = Literal["responses", "rows", "ultrafeedback", "helpsteer", "arena"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""HelpSteer's columns, 0 to 4 each."""
WINNERS = {
    "model_a": "a", "a": "a", "model_b": "b", "b": "b", "tie": "tie", "tie (bothbad)": "tie", "both_bad": "tie",
    "bothbad": "tie",
}  # fmt: skip
"""Names of a battle's outcomes; that both are bad is a tie too."""
TEXTS = ("response", "completion", "text")
"""Names under which a response's text stands, in this order."""
NAMES = ("rater", "source", "policy")


class Votes(NamedTuple):
    """What raters said of a response: of one of two, how many preferred it, the other, neither."""

    yes: int = 0
    no: int = 0
    tie: int = 0

    @property
    def total(self) -> int:
        """Number of raters."""
        return self.yes + self.no + self.tie

    @property
    def share(self) -> float:
        """Share of ``yes``; a tie is half of one."""
        return (self.yes + self.tie / 2) / self.total


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a prompt; what is None was not said."""

    text: Any
    """Text or messages."""
    score: float | None = None
    votes: Votes | None = None
    label: bool | None = None
    """Thumb up or down."""
    rater: str | None = None
    source: str | None = None
    policy: str | None = None
    """Name of the model that wrote it."""

    @property
    def key(self) -> str:
        """What equal responses have in common."""
        return plain(self.text).strip()


@dataclass(frozen=True, slots=True)
class Responses:
    """A prompt with its responses."""

    id: str
    prompt: Any
    """Text or messages, perhaps ``with_arguments``."""
    group: str | None
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class ResponseTable:
    """The prompts of a source and what is wrong with the rows that are left out."""

    prompts: list[Responses]
    problems: list[Problem] = field(default_factory=list)
    invalid: int = 0
    """Rows with a problem."""


def read_responses(
    source: PairsSection,
    *,
    shape: Shape | None = None,
    weights: Mapping[str, float] | None = None,
) -> ResponseTable:
    """Read a table of responses.

    Args:
        source: its ``path``; ``drop_invalid`` leaves invalid rows out, whose number and problems are returned.
        shape: of its rows; None: told by their columns.
        weights: HelpSteer's attributes -> their weights in the score; default: helpfulness alone.

    Raises:
        DataError: the source cannot be read, no shape fits its columns, or rows are invalid (the first 20 and a count).
        ConfigError: ``weights`` name no attribute.
    """
    weights = {ATTRIBUTES[0]: 1.0} if weights is None else dict(weights)
    if odd := sorted(set(weights) - set(ATTRIBUTES)):
        raise ConfigError(
            f"score: found {odd[0]!r}, expected attributes of {', '.join(ATTRIBUTES)}", code="response-option"
        )
    rows = read_rows(source)
    if not rows:
        raise DataError(f"{source.path}: holds no rows", code="data-empty", hint="expected responses of prompts")
    shape = shape or _shape(rows, source.path)
    found = _Reader(source.path, shape, weights)
    for row in rows:
        found.add(row)
    table = found.table()
    if table.problems and not (source.drop_invalid and table.prompts):
        raise DataError(
            f"{source.path}: {table.invalid} of {len(rows)} rows cannot be used:\n"
            f"{listed([str(problem) for problem in table.problems])}",
            code=table.problems[0].code,
            hint="fix the rows, or leave them out: --drop-invalid",
        )
    return table


def _shape(rows: Sequence[Row], path: str) -> Shape:
    names = next((set(row.values) for row in rows if not row.unreadable), set())
    if "responses" in names:
        return "responses"
    if "completions" in names:
        return "ultrafeedback"
    if {"conversation_a", "conversation_b"} <= names:
        return "arena"
    if names & set(TEXTS) and names & {"prompt", "instruction"}:
        return "helpsteer" if ATTRIBUTES[0] in names else "rows"
    raise DataError(
        f"{path}: found the columns {', '.join(sorted(names))}, expected prompt with responses or response, "
        "instruction with completions, or conversation_a with conversation_b",
        code="response-table",
        hint="docs/data.md has a row of each shape",
    )


class _Reader:
    """Collects the responses of each prompt, row by row.

    Args:
        path: name of the source.
        shape: of its rows.
        weights: of HelpSteer's attributes.
    """

    def __init__(self, path: str, shape: Shape, weights: Mapping[str, float]) -> None:
        self.path, self.shape, self.weights = path, shape, weights
        self.checks = RowReader(path, {"prompt"})
        self.prompts: dict[str, tuple[Any, str | None, list[Response], Row]] = {}
        self.problems: list[Problem] = []
        self.invalid: set[tuple[str, int]] = set()

    def add(self, row: Row) -> None:
        """Read one row."""
        before = len(self.problems)
        if row.unreadable:
            found, _, expected = row.unreadable.removeprefix("found ").partition(", expected ")
            self._problem(row, "(row)", "data-row", found, expected)
        else:
            prompt, responses = self._read(row)
            if len(self.problems) == before:
                self._add(row, prompt, responses)
        if len(self.problems) > before:
            self.invalid.add((row.file, row.number))

    def _add(self, row: Row, prompt: Any, responses: list[Response]) -> None:
        own = row.values.get("prompt_id")
        own = row.values.get("id") if own is None and self.shape in ("responses", "ultrafeedback") else own
        battle = sorted(one.key for one in responses) if self.shape == "arena" else []
        key = content_id([prompt, *battle], SeenIds()) if own is None else str(own)
        group = row.values.get("group")
        known = self.prompts.setdefault(key, (prompt, None if group is None else str(group), [], row))
        if plain(known[0]) != plain(prompt):
            self._problem(row, "prompt", "response-table", f"another prompt with the id {key!r}", "one prompt per id")
        elif any(isinstance(one.text, str) != isinstance(prompt, str) for one in responses):
            kinds = "messages and text" if not isinstance(prompt, str) else "text and messages"
            self._problem(row, "(row)", "pair-mixed", kinds, "prompt and responses of one kind")
        else:
            known[2].extend(responses)

    def _read(self, row: Row) -> tuple[Any, list[Response]]:
        values = row.values
        if self.shape == "arena":
            return self._battle(row)
        name = "prompt" if values.get("prompt") is not None else "instruction"
        prompt = self._prompt(row, name)
        if self.shape in ("rows", "helpsteer"):
            return prompt, self._response(row, values, "")
        many = values.get("responses" if self.shape == "responses" else "completions")
        column = "responses" if self.shape == "responses" else "completions"
        if not isinstance(many, list) or not many:
            self._problem(row, column, "response-table", repr(many), "a list of at least one response")
            return prompt, []
        found: list[Response] = []
        for k, cell in enumerate(many, 1):
            one = {"response": cell} if isinstance(cell, str) else cell
            if not isinstance(one, Mapping):
                self._problem(row, f"{column}[{k}]", "response-table", repr(one), "an object with response")
                continue
            found += self._response(row, one, f"{column}[{k}].")
        return prompt, self._mirrored(row, column, found)

    def _prompt(self, row: Row, name: str) -> Any:
        problems = self.checks.text(row, name)
        self.problems += problems
        if problems:
            return None
        arguments = {}
        for argument in TEMPLATE_COLUMNS:
            arguments[argument], wrong = self.checks.template_argument(row, argument, row.values.get(argument))
            self.problems += wrong
        return with_arguments(row.values[name], arguments)

    def _response(self, row: Row, values: Mapping[str, Any], where: str) -> list[Response]:
        before = len(self.problems)
        name = next((name for name in TEXTS if values.get(name) is not None), TEXTS[0])
        text = as_messages(values.get(name))
        self.problems += self.checks.text(Row(row.number, {f"{where}{name}": text}, file=row.file), f"{where}{name}")
        label, votes = self._label(row, values, where), self._votes(row, values, where)
        score = self._score(row, values, where)
        names = {one: None if values.get(one) is None else str(values[one]) for one in NAMES}
        names["policy"] = names["policy"] or (None if values.get("model") is None else str(values["model"]))
        if label is not None and votes is not None and votes.yes != votes.no and label != (votes.yes > votes.no):
            found = f"{label} with {votes.yes} votes for and {votes.no} against it"
            self._problem(row, f"{where}label", "response-table", found, "a label that its votes do not contradict")
        return [Response(text, score, votes, label, **names)] if len(self.problems) == before else []

    def _score(self, row: Row, values: Mapping[str, Any], where: str) -> float | None:
        if self.shape == "helpsteer":
            parts = []
            for name, weight in self.weights.items():
                if values.get(name) is None:
                    self._problem(row, f"{where}{name}", "pair-missing", "nothing", "a number")
                    return None
                number, problems = self.checks.number(row, f"{where}{name}", values[name])
                self.problems += problems
                parts.append(0.0 if number is None else weight * number)
            return sum(parts)
        name = next((one for one in ("score", "overall_score") if values.get(one) is not None), "score")
        number, problems = self.checks.number(row, f"{where}{name}", values.get(name))
        self.problems += problems
        return number

    def _label(self, row: Row, values: Mapping[str, Any], where: str) -> bool | None:
        value = values.get("label")
        if value is None or isinstance(value, bool):
            return value
        if value in (0, 1):
            return bool(value)
        self._problem(row, f"{where}label", "response-table", repr(value), "true (thumb up) or false")
        return None

    def _votes(self, row: Row, values: Mapping[str, Any], where: str) -> Votes | None:
        value = values.get("votes")
        if value is None:
            return None
        counts = {key: one for key, one in value.items() if one is not None} if isinstance(value, Mapping) else {}
        whole = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in counts.values())
        if not counts or not set(counts) <= set(Votes._fields) or not whole or not sum(counts.values()):
            expected = "{yes: 3, no: 1, tie: 0}, whole numbers of raters, not all 0"
            self._problem(row, f"{where}votes", "response-table", repr(value), expected)
            return None
        return Votes(**counts)

    def _mirrored(self, row: Row, column: str, found: list[Response]) -> list[Response]:
        """Two responses with the votes of both: those for one are those against the other."""
        if len(found) != 2 or all(one.votes is None for one in found):
            return found
        first, second = (one.votes for one in found)
        if first is not None and second is not None and first != Votes(second.no, second.yes, second.tie):
            expected = f"the votes of the other response turned around, {first.no} for and {first.yes} against"
            self._problem(row, f"{column}[2].votes", "response-table", str(tuple(second)), expected)
            return found
        first = first or Votes(second.no, second.yes, second.tie)  # type: ignore[union-attr]
        return [replace(found[0], votes=first), replace(found[1], votes=Votes(first.no, first.yes, first.tie))]

    def _battle(self, row: Row) -> tuple[Any, list[Response]]:
        """The two responses of a battle, each with one vote; both conversations must ask the same."""
        sides = []
        for name in ("conversation_a", "conversation_b"):
            problems = self.checks.text(row, name)
            self.problems += problems
            talk = row.values.get(name)
            if not problems and (isinstance(talk, str) or talk[-1]["role"] != "assistant"):  # type: ignore[index]
                self._problem(row, name, "pair-role", "no last message by assistant", "a conversation that ends in one")
                problems = [self.problems[-1]]
            sides.append(None if problems else talk)
        winner = WINNERS.get(str(row.values.get("winner")))
        if winner is None:
            self._problem(row, "winner", "response-table", repr(row.values.get("winner")), " or ".join(WINNERS))
        first, second = sides
        if first is None or second is None or winner is None:
            return None, []
        if first[0] != second[0]:
            self._problem(row, "conversation_b", "response-table", "another first message", "that of conversation_a")
            return None, []
        shared = next((k for k in range(min(len(first), len(second))) if first[k] != second[k]), len(first) - 1)
        shared = min(shared, len(first) - 1, len(second) - 1)
        while shared and first[shared - 1]["role"] == "assistant":
            shared -= 1
        judge = row.values.get("judge")
        rater = None if judge is None else str(judge)
        names = [row.values.get(name) for name in ("model_a", "model_b")]
        votes = {"a": Votes(1, 0, 0), "b": Votes(0, 1, 0), "tie": Votes(0, 0, 1)}[winner]
        both = [votes, Votes(votes.no, votes.yes, votes.tie)]
        return first[:shared], [
            Response(talk[shared:], votes=one, rater=rater, policy=None if name is None else str(name))
            for talk, one, name in zip(sides, both, names, strict=True)
            if talk is not None
        ]

    def table(self) -> ResponseTable:
        """The prompts that were read, with what contradicts itself among their responses."""
        kept = []
        for key, (prompt, group, responses, row) in self.prompts.items():
            clash = _contradiction(responses)
            if clash:
                self._problem(row, "label", "response-table", clash, "scores and labels that agree on what is better")
                self.invalid.add((row.file, row.number))
            elif responses:
                kept.append(Responses(key, prompt, group, tuple(responses)))
        return ResponseTable(kept, self.problems, len(self.invalid))

    def _problem(self, row: Row, column: str, code: str, found: str, expected: str) -> None:
        self.problems.append(self.checks.problem(row, column, code, found, expected))


def _contradiction(responses: Sequence[Response]) -> str:
    """Scores that contradict labels of the same rater; empty if none do."""
    rated = [one for one in responses if one.label is not None and one.score is not None]
    for good in (one for one in rated if one.label):
        for bad in (one for one in rated if not one.label and one.rater == good.rater):
            if (good.score or 0.0) < (bad.score or 0.0):
                return f"true for a response with score {good.score:g} and false for one with {bad.score:g}"
    return ""


def counts_of(table: ResponseTable) -> dict[str, int]:
    """Numbers of a table: prompts, responses, and how many of these have a score, votes, a label."""
    flat = [one for prompt in table.prompts for one in prompt.responses]
    said = Counter(name for one in flat for name in ("score", "votes", "label") if getattr(one, name) is not None)
    return {"prompts": len(table.prompts), "responses": len(flat), "invalid_rows": table.invalid} | {
        f"with_{name}": said[name] for name in ("score", "votes", "label")
    }
