"""From a prompt and a completion to token ids: one way, for training and for scoring."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.errors import DataError, ModelError
from align.io.console import log


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


class PairTexts(NamedTuple):
    """Both responses of N pairs, each after its prompt: those of the chosen, then those of the rejected, each [2N]."""

    texts: list[str]
    ids: list[list[int]]
    alike: np.ndarray
    """Whether the two are cut alike, bool [N]; see ``cut_alike``."""

    def of(self, rows: np.ndarray) -> "PairTexts":
        """Those of some pairs."""
        both = [*rows, *(rows + len(self.alike))]
        return PairTexts([self.texts[k] for k in both], [self.ids[k] for k in both], self.alike[rows])


def pair_texts(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PairTexts:
    """The pairs as a reward model reads them; see ``render`` and ``tokenize``."""
    texts = [render(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected") for row in pairs]
    ids, count = tokenize(texts, tokenizer, max_length), len(pairs)
    full = _full(tokenizer, max_length)
    alike = [_alike(*sides, full) for sides in zip(texts[:count], texts[count:], ids[:count], ids[count:], strict=True)]
    return PairTexts(texts, ids, np.array(alike, dtype=bool))


def cut_alike(
    first: Sequence[str], second: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> np.ndarray:
    """Whether two different texts are the same tokens once they are cut to ``max_length``, bool [N].

    No reward tells them apart: what they begin with, as a rule their prompt, fills ``max_length``.
    """
    full, ids = _full(tokenizer, max_length), tokenize(first, tokenizer, max_length)
    found = np.array([len(row) >= full for row in ids], dtype=bool)
    places = np.flatnonzero(found).tolist()
    others = tokenize([second[k] for k in places], tokenizer, max_length)
    for k, other in zip(places, others, strict=True):
        found[k] = _alike(first[k], second[k], ids[k], other, full)
    return found


def told_apart(alike: np.ndarray, max_length: int) -> np.ndarray:
    """Places of the pairs that are not cut alike, from which a reward model learns; how many others there are is said.

    Raises:
        DataError: there are only others.
    """
    kept = np.flatnonzero(~alike)
    if alike.any() and not len(kept):
        raise DataError(
            f"none of {len(alike)} pairs has responses that differ within {max_length} tokens",
            code="empty-completion",
            hint="raise reward.max_length, or take a model that reads longer texts",
        )
    if alike.any():
        log.warning("%d of %d pairs are left out: their prompts fill max_length", alike.sum(), len(alike))
    return kept


def _full(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Tokens of a text that may have been cut, at least."""
    return max_length - (tokenizer.eos_token_id is not None)


def _alike(first: str, second: str, ids: list[int], others: list[int], full: int) -> bool:
    return first != second and ids == others and len(ids) >= full
