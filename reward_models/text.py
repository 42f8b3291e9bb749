"""From a prompt and a completion to token ids: one way, for training and for scoring."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import ModelError


def render(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that a reward model reads: prompt + completion, through the chat template where they are messages.

    Raises:
        ModelError: messages, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt + completion
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: no chat template, and the pairs are conversational",
            code="no-chat-template",
            hint="use a model with a chat template, or plain-text pairs",
        )
    return str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text, cut from the right to ``max_length`` tokens, ending in the end-of-sequence token if any.

    An encoder's tokenizer has none and puts its own special tokens around the text.
    """
    eos = tokenizer.eos_token_id
    room = max_length - (eos is not None)
    ids = tokenizer(list(texts), truncation=True, max_length=room, padding=False)["input_ids"]
    if eos is None:
        return [list(row) for row in ids]
    return [list(row) if row and row[-1] == eos else [*row, eos] for row in ids]
