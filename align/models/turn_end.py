"""The special tokens with which a chat template ends an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.io.console import log
from align.models.chat_template import ANSWERED, ASKED, templated

Talk = Sequence[Mapping[str, Any]]
TALK: Talk = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
TALKS: tuple[Talk, ...] = (
    TALK,
    [{"role": "system", "content": "be brief"}, *TALK],
    [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK],
)
"""The same question and answer for templates that need a system message, or contents in parts."""


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens that the chat template writes after an answer, such as ``<|im_end|>`` in ChatML.

    A base model with such a template often has another end of sequence, in its tokenizer and in its generation config.
    Training on messages teaches this token as the end, so that sampling must stop at it. Where the template writes
    several special tokens, or text before them, it is the first of them; several named templates may end differently.

    Empty: the tokenizer has no chat template or one that takes none of ``TALKS``, or an answer ends in plain text or in
    nothing.
    """
    found = (_first_special(tokenizer, text) for text in _after_answers(tokenizer))
    return {token for token in found if token is not None}


def report_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn that a training on messages teaches no end, because the chat template writes no special token after one."""
    if any(_first_special(tokenizer, text) is None for text in _after_answers(tokenizer)):
        log.warning(
            "%s: its chat template writes no special token after an answer, so nothing teaches where a response ends: "
            "sampling goes on to its limit of tokens, or to a text that it is told to stop at",
            tokenizer.name_or_path or "the tokenizer",
        )  # fmt: skip


def _after_answers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each template of a tokenizer writes after an answer; none for those that take no talk."""
    given: Any = tokenizer.chat_template or {}
    found = []
    for source in given.values() if isinstance(given, Mapping) else [given]:
        texts = (_after_answer(tokenizer, talk, str(source)) for talk in TALKS)
        found += [text for text in texts if text is not None][:1]
    return found


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Id of the first special token of a text; added tokens of white space and the unknown one are none."""
    added = {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items()}
    added.pop(tokenizer.unk_token_id, None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if added.get(token, "").strip()), None)


def _after_answer(tokenizer: PreTrainedTokenizerBase, talk: Talk, source: str) -> str | None:
    """What a template writes after the content of an answer; None if it does not take these messages."""
    settings = {"chat_template": source}
    whole, cut = "", ""
    try:
        whole = templated(talk, tokenizer, generation_prompt=False, settings=settings, tokenize=False)
        cut = templated(talk, tokenizer, generation_prompt=False, settings=settings, tokenize=False, cut_off=True)
    except AlignError:
        return None
    return whole[len(cut) :] if whole.startswith(cut) else None
