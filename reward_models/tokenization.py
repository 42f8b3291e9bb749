"""Pairs as a reward model reads them, and which of them it cannot tell apart after truncation."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config.columns import RESPONSES
from align.data.text import plain
from align.errors import ModelError
from align.io.console import log
from align.models.chat_template import template_settings
from align.models.pair_rows import pair_name
from align.models.tokenization import encode_reward_texts, render, report_same_tokens, truncated
from reward_models.token_rows import SegmentedIds, TokenRows

ROWS = 1024
"""Pairs that are rendered and tokenized at a time."""


class SentencePair(str):
    """Prompt and response one after the other, which are two texts to an encoder's tokenizer."""

    first: str
    second: str

    def __new__(cls, first: str, second: str) -> "SentencePair":
        """Join them; both stay known."""
        made = super().__new__(cls, first + second)
        made.first, made.second = first, second
        return made


class PairTokens(NamedTuple):
    """Token ids of both responses of N pairs, each after its prompt."""

    chosen: TokenRows
    """[N]"""
    rejected: TokenRows
    """[N]"""
    alike: np.ndarray
    """bool [N], whether both responses are the same tokens, by truncation or because the chat template drops what
    differs."""

    def of(self, rows: np.ndarray) -> "PairTokens":
        """The pairs at some indices; without a copy if they are all."""
        if len(rows) == len(self.alike):
            return self
        chosen, rejected = (TokenRows(side[k] for k in rows.tolist()) for side in (self.chosen, self.rejected))
        return PairTokens(chosen, rejected, self.alike[rows])


def reward_text(
    prompt: Any,
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_pair: bool,
    row: str = "",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """What a reward model reads of a prompt and a response: see ``render``, or as a ``SentencePair``.

    In a sentence pair, messages are plain text (``align.data.text.plain``): one by the user is its content.

    Raises:
        ModelError, DataError: see ``render``.
    """
    if text_pair:
        return SentencePair(plain(prompt), plain(completion))
    return render(prompt, completion, tokenizer, row=row, settings=settings)


def reward_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text: see ``encode_reward_texts``.

    A ``SentencePair`` gets what the tokenizer puts around two texts, of which the longer is truncated first, on the
    right; its ids are ``SegmentedIds``.

    Raises:
        ModelError: the tokenizer marks the two texts otherwise than BERT's (XLNet's has a third kind of token).
    """
    paired = {k: text for k, text in enumerate(texts) if isinstance(text, SentencePair)}
    if not paired:
        return encode_reward_texts(texts, tokenizer, max_length)
    others = [k for k in range(len(texts)) if k not in paired]
    found: dict[int, list[int]] = {}
    if others:
        found |= zip(others, encode_reward_texts([texts[k] for k in others], tokenizer, max_length), strict=True)
    both = [text.first for text in paired.values()], [text.second for text in paired.values()]
    rows = truncated(tokenizer, *both, max_length=max_length)
    every = rows.get("token_type_ids", [[]] * len(paired))
    for k, ids, types in zip(paired, rows["input_ids"], every, strict=True):
        found[k] = segmented = SegmentedIds(ids)
        segmented.second = types.index(1) if 1 in types else len(ids)
        if any(kind != (place >= segmented.second) for place, kind in enumerate(types)):
            raise ModelError(
                f"{tokenizer.name_or_path}: found token types {sorted(set(types))} of a sentence pair, expected 0 in "
                "the first text and 1 from where the second begins",
                code="reward-text-pair",
                hint="take a model whose tokenizer marks sentence pairs as BERT's does",
            )
    return [found[k] for k in range(len(texts))]


def second_starts(rows: Iterable[list[int]]) -> list[int]:
    """Where the second text of each row of token ids begins; its length where it is one text."""
    return [row.second if isinstance(row, SegmentedIds) else len(row) for row in rows]


def segments(attention_mask: Tensor, seconds: Sequence[int]) -> Tensor:
    """Token type ids [N, T] of right-padded rows: 1 from where the second text of each begins, 0 for padding."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    starts = torch.as_tensor(seconds, device=attention_mask.device)
    return ((places >= starts[:, None]) & attention_mask.bool()).long()


def pair_tokens(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, text_pair: bool = False
) -> PairTokens:
    """The pairs as a reward model reads them; see ``reward_text`` and ``reward_ids``. ``ROWS`` pairs at a time.

    Raises:
        ModelError, DataError: messages that cannot go through the chat template; names the pair.
    """
    sides, alike = (TokenRows(), TokenRows()), np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), ROWS):
        rows = list(pairs.select(range(start, min(start + ROWS, len(pairs)))))
        made = []
        for side, kept in zip(RESPONSES, sides, strict=True):
            texts = [pair_text(row, side, tokenizer, text_pair=text_pair) for row in rows]
            made.append(reward_ids(texts, tokenizer, max_length))
            kept.extend(made[-1])
        alike[start : start + len(rows)] = [chosen == rejected for chosen, rejected in zip(*made, strict=True)]
    return PairTokens(*sides, alike)


def pair_text(row: Mapping[str, Any], side: str, tokenizer: PreTrainedTokenizerBase, *, text_pair: bool) -> str:
    """What a reward model reads of one response (``side``) of a pair, after its prompt; see ``reward_text``."""
    name, settings = pair_name(row), template_settings(row)
    return reward_text(row["prompt"], row[side], tokenizer, text_pair=text_pair, row=name, settings=settings)


def cut_alike(
    first: Sequence[str], second: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> np.ndarray:
    """Whether two different texts are the same tokens once they are truncated to ``max_length``, bool [N].

    No reward tells them apart: what they begin with, usually their prompt, fills ``max_length``.
    """
    full, ids = _full(tokenizer, max_length), reward_ids(first, tokenizer, max_length)
    found = np.array([len(row) >= full for row in ids], dtype=bool)
    places = np.flatnonzero(found).tolist()
    others = reward_ids([second[k] for k in places], tokenizer, max_length)
    for k, other in zip(places, others, strict=True):
        found[k] = _alike(first[k], second[k], ids[k], other, full)
    return found


def unread(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    text_pair: bool = False,
) -> np.ndarray:
    """Whether the prompt leaves no room for its completion within ``max_length``, bool [N]."""
    rows = list(zip(prompts, completions, strict=True))
    whole = [reward_text(prompt, completion, tokenizer, text_pair=text_pair) for prompt, completion in rows]
    nothing = ["" if isinstance(prompt, str) else [] for prompt, _ in rows]
    asked = [
        reward_text(prompt, empty, tokenizer, text_pair=text_pair)
        for (prompt, _), empty in zip(rows, nothing, strict=True)
    ]
    return cut_alike(whole, asked, tokenizer, max_length)


def warn_of_unread(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    text_pair: bool = False,
) -> None:
    """Warn of completions that are not read because their prompts fill ``max_length``; see ``unread``."""
    count = unread(prompts, completions, tokenizer, max_length, text_pair=text_pair).sum()
    if count:
        log.warning("%d of %d completions are not read: their prompts fill max_length", count, len(prompts))


def told_apart(pairs: Dataset, alike: np.ndarray, max_length: int) -> np.ndarray:
    """Indices of pairs whose responses differ as a reward model reads them; logs how many do not.

    Args:
        pairs: table of N pairs; without the column ``id``, pairs are named by their place.
        alike: whether the two responses are the same tokens, bool [N].
        max_length: tokens of prompt and response together.

    Raises:
        DataError: no pair is left.
    """
    names = pairs["id"] if "id" in pairs.column_names else range(len(pairs))
    same = [str(name) for name, of in zip(names, alike, strict=True) if of]
    report_same_tokens(same, len(alike), f"within max_length {max_length}")
    return np.flatnonzero(~alike)


def _full(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Least number of tokens of a text that may have been truncated."""
    return max_length - (tokenizer.eos_token_id is not None)


def _alike(first: str, second: str, ids: list[int], others: list[int], full: int) -> bool:
    return first != second and ids == others and len(ids) >= full
