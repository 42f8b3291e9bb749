"""From a prompt and a completion to token ids: one way, for training and for scoring."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.console import log
from align.errors import DataError, ModelError


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
    """Token ids of each text, cut from the right to ``max_length`` tokens.

    Plain text has the special tokens that the tokenizer puts around it and ends in the end-of-sequence token, if there
    is one. ``Rendered`` text has those of its template alone, as trl trains on it, but an encoder's, whose model reads
    its first token.
    """
    bare = [isinstance(text, Rendered) and tokenizer.cls_token_id is None for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    eos = tokenizer.eos_token_id
    for kind in set(bare):
        room = max_length - (eos is not None and not kind)
        places = [k for k, is_bare in enumerate(bare) if is_bare == kind]
        chosen = [str(texts[k]) for k in places]
        rows = tokenizer(chosen, add_special_tokens=not kind, truncation=True, max_length=room, padding=False)
        for k, row in zip(places, rows["input_ids"], strict=True):
            ids[k] = list(row)
    ended = [eos is None or is_bare or (row and row[-1] == eos) for row, is_bare in zip(ids, bare, strict=True)]
    return [row if is_ended else [*row, eos] for row, is_ended in zip(ids, ended, strict=True)]


def cut_alike(
    first: Sequence[str], second: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> np.ndarray:
    """Whether two different texts are the same tokens once they are cut to ``max_length``, bool [N].

    No reward tells them apart: what they begin with, as a rule their prompt, fills ``max_length``.
    """
    ids = (tokenize(texts, tokenizer, max_length) for texts in (first, second))
    full = max_length - (tokenizer.eos_token_id is not None)
    rows = zip(first, second, *ids, strict=True)
    return np.array([one != other and a == b and len(a) >= full for one, other, a, b in rows], dtype=bool)


def pairs_cut_alike(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> np.ndarray:
    """Whether the two responses of each pair are cut alike after its prompt, bool [N]; see ``cut_alike``."""
    chosen, rejected = (
        [render(row["prompt"], row[side], tokenizer) for row in pairs] for side in ("chosen", "rejected")
    )
    return cut_alike(chosen, rejected, tokenizer, max_length)


def pairs_told_apart(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The pairs without those that are cut alike, from which a reward model learns nothing; how many are said.

    Raises:
        DataError: none is left.
    """
    alike = pairs_cut_alike(pairs, tokenizer, max_length)
    if not alike.any():
        return pairs
    if alike.all():
        raise DataError(
            f"none of {len(pairs)} pairs has responses that differ within {max_length} tokens",
            code="empty-completion",
            hint="raise reward.max_length, or take a model that reads longer texts",
        )
    log.warning("%d of %d pairs are left out: their prompts fill max_length", alike.sum(), len(pairs))
    return pairs.select(np.flatnonzero(~alike))
