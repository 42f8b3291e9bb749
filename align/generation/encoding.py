"""Encode prompts and decode completions, for every engine that has a tokenizer."""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import ModelError
from align.generation.types import Completion


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """Token ids of a prompt: text is tokenized as it is, messages through the chat template with the generation prompt.

    Raises:
        ModelError: the prompt is a list of messages and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: no chat template, and a prompt is a list of messages",
            code="no-chat-template",
            hint="use a model with a chat template, or plain-text prompts",
        )
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Ids of the tokens that end a completion: the tokenizer's end of sequence and the generation config's."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    return sorted(token for token in ids if token is not None)


def to_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampled: Sequence[int],
    stops: Collection[int],
    logprobs: Sequence[float] | None,
) -> Completion:
    """The completion of ``prompt`` (token ids): ``sampled`` up to and including the first of ``stops``."""
    end = next((k + 1 for k, token in enumerate(sampled) if token in stops), None)
    tokens = list(sampled[:end])
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True)
    kept = None if logprobs is None else list(logprobs[: len(tokens)])
    return Completion(text, tokens, "length" if end is None else "stop", kept)
