"""Whose words the tokens of a response are: masks of responses that hold several messages.

In a response of one message every token counts, as in trl. In one of several messages (an answer, a question of the
user or a tool's result, a further answer) the tokens of others are read but carry no loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.config.columns import ID_COLUMNS, MASK_COLUMNS, RESPONSES
from align.errors import DataError
from align.models.chat_template import END_MARK, generation_spans, shared_length, template_settings, templated
from align.models.pair_rows import is_cut_off, pair_name

Turns = Literal["assistant", "all", "last"]
"""assistant: the tokens of every assistant's message; last: those of the last one; all: every token, as in trl."""
TURNS: tuple[Turns, ...] = ("assistant", "all", "last")
ASSISTANT = "assistant"


class _Conversation(NamedTuple):
    """A prompt with a response, and how its template is called."""

    messages: list[dict[str, Any]]
    first: int
    """Number of messages of the prompt."""
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    row: str
    """Name of the row for errors."""

    def text(self, messages: Sequence[Mapping[str, Any]], *, ask: bool = False, cut_off: bool = False) -> str:
        """Messages as text; with ``ask`` also what begins an answer."""
        return str(
            templated(
                messages, self.tokenizer, generation_prompt=ask, row=self.row, settings=self.settings, tokenize=False,
                cut_off=cut_off,
            )
        )  # fmt: skip

    def ids(self, text: str) -> list[int]:
        """Token ids of text from the template."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def has_turns(pairs: Dataset) -> bool:
    """Whether a response of the table holds several messages."""
    if not len(pairs) or isinstance(pairs[0]["chosen"], str):
        return False
    return any(len(response) > 1 for side in RESPONSES for response in pairs[side])


def pair_masks(
    pair: Mapping[str, Any],
    ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    turns: Turns = "assistant",
) -> dict[str, list[int]]:
    """The columns ``MASK_COLUMNS`` of a pair; see ``response_mask``.

    Args:
        pair: has ``prompt``, ``chosen``, ``rejected``.
        ids: token ids of these three.
        tokenizer: of the policy.
        turns: see ``Turns``.

    Raises:
        DataError: see ``response_mask``.
    """
    prompt, *responses = ids
    return {
        name: response_mask(pair, side, [*prompt, *tokens], len(prompt), tokenizer, turns=turns)
        for name, side, tokens in zip(MASK_COLUMNS, RESPONSES, responses, strict=True)
    }


def response_mask(
    pair: Mapping[str, Any],
    side: str,
    ids: Sequence[int],
    start: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    turns: Turns,
) -> list[int]:
    """Which tokens of a response count, a list of 0 and 1.

    The template says it if it has ``{% generation %}`` blocks. Otherwise a message begins where the text of the
    messages before it ends, with what begins an answer, and ends where the text of the messages up to it ends, if these
    texts begin the text of the whole conversation; a template that writes them differently has to write a mark at the
    end (or the start) of the message's content, and nothing else may change.

    Args:
        pair: has ``prompt`` and the response; see also ``template_settings``.
        side: chosen or rejected.
        ids: tokens of prompt and response.
        start: number of tokens before the response.
        tokenizer: of the policy.
        turns: see ``Turns``.

    Raises:
        DataError: the template does not let the words of the assistant be told from those of others.
    """
    response = pair[side]
    if turns == "all" or isinstance(response, str) or len(response) == 1:
        return [1] * (len(ids) - start)
    prompt, cut_off = list(pair["prompt"]), is_cut_off(pair, side)
    talk = _Conversation([*prompt, *response], len(prompt), tokenizer, template_settings(pair), pair_name(pair))
    own = [k for k in range(talk.first, len(talk.messages)) if talk.messages[k]["role"] == ASSISTANT]
    own = own[-1:] if turns == "last" else own
    whole = talk.text(talk.messages, cut_off=cut_off)
    spans = generation_spans(talk.messages, tokenizer, talk.settings)
    if spans is None:
        spans = [_span(talk, whole, k, side) for k in own]
    elif turns == "last":
        first = _start(talk, whole, own[-1]) or 0
        spans = [span for span in spans if span[1] > first]
    marked = [0] * len(ids)
    for place, span in enumerate(spans):
        first, last = (shared_length(talk.ids(whole[:end]), ids) for end in span)
        if place == len(spans) - 1 and span[1] >= len(whole):
            last = len(ids)
        marked[first:last] = [1] * (last - first)
    found = marked[start:]
    if not any(found):
        raise _not_told(talk, side, own[-1])
    return found


def _span(talk: _Conversation, whole: str, k: int, side: str) -> tuple[int, int]:
    """First character of message ``k`` in the text ``whole``, and the character after its last."""
    first, last = _start(talk, whole, k), _end(talk, whole, k)
    if first is not None and last is None:
        last = _end_of_calls(talk, whole, k, first)
    if first is None or last is None or last <= first:
        raise _not_told(talk, side, k)
    return first, last


def _start(talk: _Conversation, whole: str, k: int) -> int | None:
    try:
        before = talk.text(talk.messages[:k]) if k else ""
        asked = talk.text(talk.messages[:k], ask=True)
    except DataError:
        return _marked(talk, whole, k, at_end=False)
    if whole.startswith(before):
        return max(len(before), shared_length(asked, whole))
    return _marked(talk, whole, k, at_end=False)


def _end(talk: _Conversation, whole: str, k: int) -> int | None:
    if k == len(talk.messages) - 1:
        return len(whole)
    try:
        until = talk.text(talk.messages[: k + 1])
    except DataError:
        return _marked(talk, whole, k, at_end=True)
    if whole.startswith(until):
        return len(until)
    place = _marked(talk, whole, k, at_end=True)
    if place is None:
        return None
    alone = talk.text(_with_mark(talk.messages[: k + 1], k, at_end=True))
    return place + shared_length(alone.partition(END_MARK)[2], whole[place:])  # such as the end of a message


def _end_of_calls(talk: _Conversation, whole: str, k: int, first: int) -> int | None:
    """End of message ``k`` that calls tools, where its template writes thoughts before the last message alone.

    Its text as the last message, without what may stand before the calls, has to follow ``first`` in the whole text.
    """
    calls = talk.messages[k].get("tool_calls") or []
    names = [str((call.get("function") or call).get("name")) for call in calls]
    if not names:
        return None
    alone = talk.text(talk.messages[: k + 1])
    text = alone[shared_length(talk.text(talk.messages[:k], ask=True), alone) :]
    for place in range(len(text)):
        if not all(name in text[place:] for name in names):
            return None
        if whole.startswith(text[place:], first):
            return first + len(text) - place
    return None


def _marked(talk: _Conversation, whole: str, k: int, *, at_end: bool) -> int | None:
    """Place of the start or end of the content of message ``k``; None if a mark there changes anything else."""
    content = talk.messages[k].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    try:
        text = talk.text(_with_mark(talk.messages, k, at_end=at_end))
    except DataError:
        return None
    place = text.find(END_MARK)
    found = place >= 0 and text.replace(END_MARK, "") == talk.text(talk.messages) and text[:place] == whole[:place]
    return place if found else None


def _with_mark(messages: Sequence[dict[str, Any]], k: int, *, at_end: bool) -> list[dict[str, Any]]:
    """The messages with a mark before or behind the content of message ``k``, inside of its white space."""
    content = str(messages[k]["content"])
    place = len(content.rstrip()) if at_end else len(content) - len(content.lstrip())
    marked = content[:place] + END_MARK + content[place:]
    return [message | ({"content": marked} if number == k else {}) for number, message in enumerate(messages)]


def _not_told(talk: _Conversation, side: str, k: int) -> DataError:
    return DataError(
        f"{talk.row or 'a pair'}: {side}[{k - talk.first + 1}]: the chat template of {talk.tokenizer.name_or_path} "
        "writes the messages before and after it such that its words cannot be told from those of others",
        code="turns",
        hint="put {% generation %}...{% endgeneration %} around the assistant's words in the template, end the "
        "response before this message, or let every turn count: turns: all",
    )


def counted(row: Mapping[str, Any], max_length: int | None, truncation: str) -> bool:
    """Whether both responses of a row with ``ID_COLUMNS`` have a token that counts within ``max_length``.

    Args:
        row: may have ``MASK_COLUMNS``.
        max_length: tokens of prompt and response together; None: no limit.
        truncation: keep_start or keep_end, as in trl.DPOConfig.
    """
    prompt, *responses = (row[name] for name in ID_COLUMNS)
    for response, name in zip(responses, MASK_COLUMNS, strict=True):
        size = len(response)
        if max_length is not None:
            size = min(size, max_length if truncation == "keep_end" else max(max_length - len(prompt), 0))
        first = len(response) - size if truncation == "keep_end" else 0
        if size == 0 or (row.get(name) is not None and not any(row[name][first : first + size])):
            return False
    return True
