"""Pairs as a reward model reads them, and which of them it cannot tell apart after truncation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.config.columns import RESPONSES
from align.errors import DataError
from align.io.console import log
from align.models.chat_template import template_settings
from align.models.tokenization import encode_reward_texts, pair_name, render


class PairTexts(NamedTuple):
    """Both responses of N pairs, each after its prompt: first those of the chosen, then those of the rejected."""

    texts: list[str]
    """[2N]"""
    ids: list[list[int]]
    """[2N]"""
    alike: np.ndarray
    """bool [N], whether both responses are the same tokens, by truncation or because the chat template drops what
    differs."""

    def of(self, rows: np.ndarray) -> "PairTexts":
        """The pairs at some indices."""
        both = [*rows, *(rows + len(self.alike))]
        return PairTexts([self.texts[k] for k in both], [self.ids[k] for k in both], self.alike[rows])


def pair_texts(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PairTexts:
    """The pairs as a reward model reads them; see ``render`` and ``encode_reward_texts``.

    Raises:
        ModelError, DataError: messages that cannot go through the chat template; names the pair.
    """
    texts = [
        render(row["prompt"], row[side], tokenizer, row=pair_name(row), settings=template_settings(row))
        for side in RESPONSES
        for row in pairs
    ]
    ids, count = encode_reward_texts(texts, tokenizer, max_length), len(pairs)
    alike = [chosen == rejected for chosen, rejected in zip(ids[:count], ids[count:], strict=True)]
    return PairTexts(texts, ids, np.array(alike, dtype=bool))


def cut_alike(
    first: Sequence[str], second: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> np.ndarray:
    """Whether two different texts are the same tokens once they are truncated to ``max_length``, bool [N].

    No reward tells them apart: what they begin with, usually their prompt, fills ``max_length``.
    """
    full, ids = _full(tokenizer, max_length), encode_reward_texts(first, tokenizer, max_length)
    found = np.array([len(row) >= full for row in ids], dtype=bool)
    places = np.flatnonzero(found).tolist()
    others = encode_reward_texts([second[k] for k in places], tokenizer, max_length)
    for k, other in zip(places, others, strict=True):
        found[k] = _alike(first[k], second[k], ids[k], other, full)
    return found


def told_apart(alike: np.ndarray, max_length: int) -> np.ndarray:
    """Indices of pairs whose responses still differ after truncation; logs how many are dropped.

    Raises:
        DataError: all are dropped.
    """
    kept = np.flatnonzero(~alike)
    if alike.any() and not len(kept):
        raise DataError(
            f"none of {len(alike)} pairs has responses that differ within {max_length} tokens",
            code="empty-completion",
            hint="raise reward.max_length, or take a model that reads longer texts",
        )
    if alike.any():
        log.warning("%d of %d pairs are left out: their responses are the same tokens within max_length %d",
                    alike.sum(), len(alike), max_length)  # fmt: skip
    return kept


def _full(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Least number of tokens of a text that may have been truncated."""
    return max_length - (tokenizer.eos_token_id is not None)


def _alike(first: str, second: str, ids: list[int], others: list[int], full: int) -> bool:
    return first != second and ids == others and len(ids) >= full
