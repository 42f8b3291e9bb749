"""Chat templates: messages to text or token ids, and what a template does that no row can make right."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.config.columns import TEMPLATE_COLUMNS
from align.errors import DataError, ModelError
from align.io.hashing import digest
from align.models.folders import adapter_base
from align.models.loading import load_tokenizer

SHOWN_CHARACTERS = 200
TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What rendering raises for messages that a template does not take."""
DATE_FUNCTION = "strftime_now"
"""Function of transformers by which a template writes the date."""
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
END_MARK = "\ue000end of a cut-off message\ue000"
"""Characters of no language, by which the end of a message is found in the text of a template."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Start of the block by which a template marks the assistant's own words."""
ASKED, ANSWERED, AGAIN = "first question", "an answer", "second question"


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a row hands to its chat template, as in trl: ``tools`` and ``chat_template_kwargs``.

    Args:
        row: both may be JSON, as in a pair table; keys of ``chat_template_kwargs`` that are None are left out.
    """
    tools, further = (json.loads(value) if isinstance(value, str) else value
                      for value in (row.get(name) for name in TEMPLATE_COLUMNS))  # fmt: skip
    found = {} if tools is None else {"tools": tools}
    return found | {name: value for name, value in (further or {}).items() if value is not None}


def templated(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation_prompt: bool,
    row: str = "",
    settings: Mapping[str, Any] | None = None,
    tokenize: bool = True,
    cut_off: bool = False,
) -> Any:
    """Token ids (or text) of messages, by the tokenizer's chat template.

    Args:
        messages: a conversation.
        tokenizer: a tokenizer with a chat template.
        generation_prompt: append the tokens that begin an assistant's message.
        row: name of the row with the messages, for errors: ``pair p1``.
        settings: further arguments of the template, see ``template_settings``.
        tokenize: return ids, not text.
        cut_off: leave out what the template writes after the content of the last message.

    Raises:
        ModelError: there is no chat template, it is not valid, or it begins a further message after an answer.
        DataError: the template refuses the messages, or does not write the end of one that is cut off.
    """
    source = _source(tokenizer, settings or {})
    if not generation_prompt:
        _refuse_appended(tokenizer, source)

    parts = any(isinstance(turn.get("content"), list) for turn in messages)
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]  # Arrow fills gaps
    if cut_off:
        content = turns[-1].get("content", "")
        mark = [*content, {"type": "text", "text": END_MARK}] if isinstance(content, list) else f"{content}{END_MARK}"
        turns[-1]["content"] = mark
    whole = tokenize and not cut_off and not parts
    try:
        found = tokenizer.apply_chat_template(
            turns, add_generation_prompt=generation_prompt, tokenize=whole, return_dict=whole, **(settings or {})
        )
        if cut_off and END_MARK not in found:
            raise ValueError("it does not write the end of the last message, which was cut off")
        if parts:
            _refuse_printed(turns, found)
    except TemplateSyntaxError as error:
        raise _not_valid(tokenizer, f"line {error.lineno}: {error.message}") from None
    except TEMPLATE_FAILURES as error:
        raise DataError(
            f"{row or repr(messages)[:SHOWN_CHARACTERS]}: the chat template of {tokenizer.name_or_path} does not take "
            f"these messages: {_words(error)}",
            code="chat-template",
            hint="change the messages or leave the row out, or take a model whose template takes them",
        ) from None
    if not cut_off and not parts:
        return list(found["input_ids"]) if tokenize else found
    text = found[: found.rindex(END_MARK)] if cut_off else found
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if tokenize else text


def _refuse_printed(turns: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise ValueError if a template wrote content parts as Python prints lists, because it only reads text."""
    for content in (turn.get("content") for turn in turns):
        if isinstance(content, list) and (str(content) in text or str(content[0]) in text):
            raise ValueError("it writes content parts as Python prints them; give the content as text")


def generation_spans(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> list[tuple[int, int]] | None:
    """(First character, end) of what the template's ``{% generation %}`` blocks write, the assistant's own words.

    None for a template without such blocks. transformers' mask of tokens is not used: it loses its place where a
    tokenizer drops white space.

    Raises:
        ModelError: there is no valid chat template.
    """
    source = _source(tokenizer, settings)
    if GENERATION.search(source) is None:
        return None
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    given = {**tokenizer.special_tokens_map, **settings, "chat_template": source}
    found = render_jinja_template(conversations=[turns], return_assistant_tokens_mask=True, **given)
    return [(int(first), int(end)) for first, end in found[1][0]]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading tokens, or characters, that the two have in common."""
    return next((k for k, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                min(len(first), len(second)))  # fmt: skip


def rendered_today(
    model: str, conversational: Callable[[], bool], *, trust_remote_code: bool = False
) -> dict[str, str]:
    """The part of a stage's key by which a date that the chat template writes decides whether it is up to date.

    Empty for plain text and for a template without a date, so that their keys depend on no date.

    Args:
        model: folder or hub id.
        conversational: whether some of the texts are messages; called only if the template may write a date.
        trust_remote_code: whether code of the model folder may run.
    """
    if not _may_write_date(model) or not conversational():
        return {}
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if DATE_FUNCTION not in json.dumps(tokenizer.chat_template):
        return {}
    text = _rendered(tokenizer, [("user", ASKED)])
    return {"rendered": digest(text or datetime.now().date().isoformat())}


def _may_write_date(model: str) -> bool:
    """Whether files of a model folder name ``DATE_FUNCTION``; True for a hub id, whose files are not here."""
    folders = [Path(name) for name in (model, adapter_base(model)) if name]
    if not all(folder.is_dir() for folder in folders):
        return True
    files = [file for folder in folders for pattern in TEMPLATE_FILES for file in folder.glob(pattern)]
    return any(DATE_FUNCTION in file.read_text(encoding="utf-8", errors="ignore") for file in files)


def _source(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str:
    """The template that transformers chooses for these settings.

    Raises:
        ModelError: see ``templated``.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path}: no chat template, and the texts are lists of messages",
            code="no-chat-template",
            hint="use a model with a chat template, or plain text",
        )
    try:
        return str(tokenizer.get_chat_template(settings.get("chat_template"), settings.get("tools")))
    except TEMPLATE_FAILURES as error:
        raise _not_valid(tokenizer, _words(error)) from None


def _not_valid(tokenizer: PreTrainedTokenizerBase, words: str) -> ModelError:
    return ModelError(
        f"{tokenizer.name_or_path}: its chat template is not valid ({words})",
        code="chat-template",
        hint="repair the template in the model's folder, or take another model",
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__


CHECKED: dict[str, str] = {}
"""Source of a template -> what it appends to a finished conversation, see ``_appended``."""


def _refuse_appended(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raise if the template begins a further assistant's message after an answer, which would be trained and scored."""
    if source not in CHECKED:
        CHECKED[source] = _appended(tokenizer, source)
    if CHECKED[source]:
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template ends a conversation in {CHECKED[source]!r} although its last "
            "message is an answer: found no use of add_generation_prompt, expected a further message to begin only "
            "where it is true",
            code="chat-template",
            hint="write {% if add_generation_prompt %}...{% endif %} around the end of the template",
        )


def _appended(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """End of the text after an answer, without generation prompt, that begins a further answer; empty if none does.

    It is compared with the text between an answer and the next question, which a correct template continues, and with
    the text between a question and its answer, which ends in the same words if the template begins an answer there.
    """
    short = _rendered(tokenizer, [("user", ASKED), ("assistant", ANSWERED)], source)
    long = _rendered(tokenizer, [("user", ASKED), ("assistant", ANSWERED), ("user", AGAIN)], source)
    if short is None or long is None or any(text not in short for text in (ASKED, ANSWERED)):
        return ""
    between = short.split(ASKED, 1)[1].split(ANSWERED, 1)[0]
    after = short.rpartition(ANSWERED)[2]
    following = long.partition(ANSWERED)[2].partition(AGAIN)[0]
    shared = next((k for k, pair in enumerate(zip(after, following, strict=False)) if pair[0] != pair[1]), len(after))
    left = after[shared:].rstrip()  # jinja drops a newline at the end of a template
    return left if left and between.rstrip().endswith(left) else ""


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], source: str | None = None
) -> str | None:
    """Text of a conversation without generation prompt; None if the template does not take it."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False))
    except TEMPLATE_FAILURES:
        return None
