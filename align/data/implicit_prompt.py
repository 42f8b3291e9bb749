"""The prompt of a pair whose responses contain it: trl's implicit prompt format, also next to a prompt column."""

import re
import unicodedata
from typing import Any

from align.config.columns import RESPONSES

TURN_ENDS = re.compile(
    r"(?:^|\n)[ \t]*(?:Assistant|ASSISTANT|### Response|### Assistant)[ \t]*:"
    r"|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n"
    r"|<\|assistant\|>\n?|\[/INST\]"
)
"""Ends of headers after which the assistant speaks, in texts of whole conversations."""
PROMPT_WORDS = 3
"""A prompt column of fewer words may begin both responses by chance."""
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff]")
"""Scripts without spaces between words: kana, Chinese characters, Thai, Lao."""


def split_prompt(values: dict[str, Any]) -> dict[str, Any] | None:
    """Prompt, chosen and rejected, if the responses begin with a shared prompt; None if they do not.

    Messages: the prompt is the shared messages. Text: it ends after the last shared header of an assistant's turn, else
    where a word ends, so pairs of one prompt keep one prompt. Neither response becomes empty.
    """
    chosen, rejected = (values[name] for name in RESPONSES)
    shared = _shared(chosen, rejected)
    if isinstance(chosen, str):
        shared = _text_end(chosen, rejected, shared)
    else:
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    if shared <= 0 or not (isinstance(chosen, list) or chosen[:shared].strip()):
        return None
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def with_text_prompt(values: dict[str, Any]) -> dict[str, Any] | None:
    """Messages for a row whose prompt is text and whose responses are messages; None if they do not belong together.

    Responses by the assistant alone answer the text, which becomes a message by the user. Whole conversations hold the
    text as a message by the user in their shared start, which becomes the prompt, as trl takes them.
    """
    text = values["prompt"].strip()
    if all(values[name][0]["role"] == "assistant" for name in RESPONSES):
        return {"prompt": [{"role": "user", "content": values["prompt"]}]}
    found = split_prompt(values)
    users = [turn["content"] for turn in found["prompt"] if turn["role"] == "user"] if found else []
    return found if any(content is not None and content.strip() == text for content in users) else None


def without_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """The responses without the prompt if both begin with the prompt that its own column holds, else nothing.

    A text has to hold ``PROMPT_WORDS`` words, because a short one may begin both responses by chance.
    """
    prompt = values["prompt"]
    if isinstance(prompt, str) and len(prompt.split()) < PROMPT_WORDS:
        return {}
    size = len(prompt)
    rest = {name: values[name][size:] for name in RESPONSES}
    whole = all(values[name][:size] == prompt for name in RESPONSES)
    return rest if whole and all(part.strip() if isinstance(part, str) else part for part in rest.values()) else {}


def _shared(chosen: Any, rejected: Any) -> int:
    """Number of characters or messages that both begin with."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((k for k, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))


def _text_end(chosen: str, rejected: str, shared: int) -> int:
    """Length of the prompt of two texts whose first ``shared`` characters are the same."""
    shared = min(shared, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    headers = [match.end() for match in TURN_ENDS.finditer(chosen, 0, max(shared, 0) + 1) if match.end() <= shared]
    if headers:
        return headers[-1]
    while shared > 0 and (_joined(chosen, shared) or _joined(rejected, shared)):
        shared -= 1
    return shared - 1 if shared > 0 and chosen[shared - 1] == " " else shared


def _joined(text: str, place: int) -> bool:
    """Whether the characters before and after ``place`` belong to one word or one sign."""
    before, after = text[place - 1], text[place]
    if before.isspace() or after.isspace():
        return False
    marks = unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk") or unicodedata.category(before) == "Cf"
    if marks or (ord(before) in REGIONAL_INDICATORS and ord(after) in REGIONAL_INDICATORS):
        return True
    if UNSPACED.match(before) or UNSPACED.match(after):
        return False
    ends = before in ":>]?!|" and not (place > 1 and text[place - 2].isdigit()) and after.isalpha()
    return not ends and ord(before) < 0x3000
