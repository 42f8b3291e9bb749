"""From sampled token ids to a completion, for every engine that has a tokenizer."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.generation.types import REPLACEMENT, Completion
from align.models.turn_end import turn_ends

LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, at most."""


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Ids of the tokens that end a completion: the tokenizer's end of sequence, the generation config's, and those
    with which the chat template ends an answer."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {
        *(configured if isinstance(configured, list) else [configured]),
        tokenizer.eos_token_id,
        *turn_ends(tokenizer),
    }
    return sorted(token for token in ids if token is not None)


def to_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampled: Sequence[int],
    stops: Collection[int],
    logprobs: Sequence[float] | None,
    stop_texts: Sequence[str] = (),
) -> Completion:
    """The completion of ``prompt`` (token ids): ``sampled`` up to and including the first of ``stops``.

    With ``stop_texts``, its tokens end with the one that completes the first of these texts, and its text before it.
    """
    end = next((k + 1 for k, token in enumerate(sampled) if token in stops), None)
    tokens = list(sampled[:end])
    text = _text(tokenizer, prompt, tokens)
    if first_stop(text, stop_texts) is not None:
        end = bisect_left(
            range(len(tokens)), True,
            key=lambda k: first_stop(_text(tokenizer, prompt, tokens[: k + 1]), stop_texts) is not None,
        ) + 1  # fmt: skip
        tokens = tokens[:end]
        text = _text(tokenizer, prompt, tokens)
        text = text[: first_stop(text, stop_texts)]
    if end is None and text.endswith(REPLACEMENT):
        text = _whole_characters(tokenizer, prompt, tokens)
    kept = None if logprobs is None else list(logprobs[: len(tokens)])
    return Completion(text, tokens, "length" if end is None else "stop", kept)


def first_stop(text: str, stop_texts: Sequence[str]) -> int | None:
    """Place in ``text`` of the first of the texts that end a completion; None if there is none."""
    found = [place for stop in stop_texts if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def stopped_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], sampled: Sequence[list[int]], texts: Sequence[str]
) -> list[bool]:
    """Whether each completion (token ids so far) of a prompt holds one of ``texts``, as ``to_completion`` reads it."""
    return [
        first_stop(_text(tokenizer, prompt, tokens), texts) is not None
        for prompt, tokens in zip(prompts, sampled, strict=True)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: list[int]) -> str:
    before, whole = _decoded(tokenizer, prompt), _decoded(tokenizer, [*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, tokens)


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Text of token ids as they are: no space before a sign or in ``do n't`` is taken out, though the tokenizer's
    ``clean_up_tokenization_spaces`` would."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _whole_characters(tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: list[int]) -> str:
    """Text of a completion that was cut off inside a character of several tokens, without the half of it.

    Tokenizers of bytes (GPT-2) decode the half alone to ``REPLACEMENT``. Those that fall back to bytes (Llama 2) decode
    the whole run of bytes to it, so that the text is also read without the last tokens.
    """
    shorter = (_text(tokenizer, prompt, tokens[: len(tokens) - left]) for left in range(LONGEST_CHARACTER))
    return max((text.rstrip(REPLACEMENT) for text in shorter), key=len)
