"""From a prompt and a completion to token ids: one way, for training and for scoring."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import ModelError


class Rendered(str):
    """Text of a chat template, which has written the special tokens that it wants."""

    __slots__ = ()


def render(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that a reward model reads: prompt + completion, where they are messages ``Rendered`` by the chat template.

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
    return Rendered(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text, cut from the right to ``max_length`` tokens, ending in the end-of-sequence token if any.

    The tokenizer puts its own special tokens around plain text, and around ``Rendered`` text only where it is an
    encoder's, whose model reads its first token.
    """
    bare = [isinstance(text, Rendered) and tokenizer.cls_token_id is None for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    eos = tokenizer.eos_token_id
    room = max_length - (eos is not None)
    for kind in set(bare):
        places = [k for k, is_bare in enumerate(bare) if is_bare == kind]
        chosen = [str(texts[k]) for k in places]
        rows = tokenizer(chosen, add_special_tokens=not kind, truncation=True, max_length=room, padding=False)
        for k, row in zip(places, rows["input_ids"], strict=True):
            ids[k] = list(row)
    if eos is None:
        return ids
    return [row if row and row[-1] == eos else [*row, eos] for row in ids]
