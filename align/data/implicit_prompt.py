"""Prompts that are implicit in both responses: what chosen and rejected begin with, up to the response's turn."""

import re
from typing import Any

from align.config.columns import RESPONSES
from align.data.messages import content_text

TURN = re.compile(
    r"(?:\b(?:assistant|bot|chatbot|gpt|model)\s*:|<\|assistant\|>|<\|im_start\|>assistant|<start_of_turn>model"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|\[/INST\]|###\s*(?:response|assistant)\s*:?)\n*",
    re.IGNORECASE,
)
"""Beginning of a turn of the model, in the text formats in use."""
ANSWER = re.compile(r"(?:^|(?<=[\s.?!]))(?:answer|response|reply|summary|tl;dr|a)\s*:\n*", re.IGNORECASE)
"""Beginning of an answer, in texts without turns."""
SPACED = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""A character of a word, in scripts that put spaces between words."""
JOINED = re.compile(r"[\u0300-\u036f\u200d\u20d0-\u20ff\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]")
"""A character that belongs to the one before it."""

PROMPT_WORDS = 3
"""A prompt column of fewer words may begin both responses by chance."""


def extract_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """``prompt``, ``chosen`` and ``rejected`` from two texts, or two lists of messages, that contain the prompt.

    A prompt is the same for all pairs of one question, also where two responses begin with the same words: it ends
    with the last turn of the model that begins in both texts (``Assistant:``), else with the last ``Answer:``, else
    with the last shared word. The space before a response belongs to the response, as in trl. Of messages, it ends with
    the last shared one that is not by the assistant. The prompt is empty if nothing is shared, and a response is empty
    if the other text begins with all of it.
    """
    if isinstance(chosen, str):
        end = _end_of_prompt(chosen, rejected)
    else:
        same = (k for k, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
        end = next(same, min(len(chosen), len(rejected)))
        while end and chosen[end - 1].get("role") == "assistant":
            end -= 1
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def split_prompt(values: dict[str, Any]) -> dict[str, Any] | None:
    """Prompt, chosen and rejected, if the responses begin with a shared prompt (``extract_prompt``); None if not."""
    found = extract_prompt(*(values[name] for name in RESPONSES))
    prompt = found["prompt"]
    return found if prompt and (not isinstance(prompt, str) or prompt.strip()) else None


def with_text_prompt(values: dict[str, Any]) -> dict[str, Any] | None:
    """Messages for a row whose prompt is text and whose responses are messages; None if they do not belong together.

    Responses by the assistant alone answer the text, which becomes a message by the user. Whole conversations hold the
    text as a message by the user in their shared start, which becomes the prompt, as trl takes them.
    """
    text = values["prompt"].strip()
    if all(values[name][0]["role"] == "assistant" for name in RESPONSES):
        return {"prompt": [{"role": "user", "content": values["prompt"]}]}
    found = split_prompt(values)
    users = [content_text(turn.get("content")) for turn in found["prompt"] if turn["role"] == "user"] if found else []
    return found if any(content.strip() == text for content in users) else None


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


def _end_of_prompt(chosen: str, rejected: str) -> int:
    differ = (k for k, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
    for beginning in (TURN, ANSWER):
        found = [match.end() for match in beginning.finditer(shared)]
        if found:
            return found[-1]
    end = len(shared)
    while end and any(_inside(text, end) for text in (chosen, rejected)):
        end -= 1
    return end - 1 if end and shared[end - 1] == " " else end


def _inside(text: str, place: int) -> bool:
    """Whether ``place`` lies within a word or a character of ``text``."""
    if place >= len(text):
        return False
    if JOINED.match(text[place]) or text[place - 1] == "\u200d":
        return True
    return bool(SPACED.match(text[place - 1]) and SPACED.match(text[place]))
