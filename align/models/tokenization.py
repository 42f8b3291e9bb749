"""From texts and messages to token ids and masks, in one place.

A prompt or a response is text, or a list of messages, which go through the chat template of the tokenizer. Each use has
one function here: ``encode_prompt`` for sampling and log-probs of samples, ``encode_pair`` (over a table
``tokenize_pairs``, as a batch ``collate``) for policies, ``render`` with ``encode_reward_texts`` for reward models.
``pad`` makes a batch of any rows of ids.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config.columns import ID_COLUMNS, MASK_COLUMNS, RESPONSES
from align.data.messages import split_arguments
from align.errors import DataError, ModelError
from align.io.console import log
from align.models.chat_template import shared_length, template_settings, templated
from align.models.pair_rows import is_cut_off, log_cut_off, pair_name
from align.models.special_tokens import added_tokens, of_encoder
from align.models.turns import Turns, counted, has_turns, pair_masks

MAX_LENGTH = 1024
"""Tokens of prompt and response together; trl.DPOConfig's default."""
NAMED_PAIRS = 5
"""Pairs that a message names."""


class Rendered(str):
    """Text from a chat template, which has written all special tokens."""

    __slots__ = ()


class PairIds(NamedTuple):
    """Token ids of a pair; those of a response follow those of the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    unused: list[int]
    """Last tokens of the prompt alone that do not precede the responses, see ``encode_pair``."""


class Padded(NamedTuple):
    """Rows of token ids as a batch, int64 [N, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    """1 for a token, 0 for padding."""


def apply_template(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation_prompt: bool = False,
    row: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Rendered:
    """Messages as text, by the tokenizer's chat template.

    Args:
        messages: a conversation.
        tokenizer: a tokenizer with a chat template.
        generation_prompt: append the tokens that begin an assistant's message.
        row: name of the row with the messages, for errors: ``pair p1``.
        settings: further arguments of the template, see ``template_settings``.

    Raises:
        ModelError, DataError: see ``templated``.
    """
    found = templated(
        messages, tokenizer, generation_prompt=generation_prompt, row=row, settings=settings, tokenize=False
    )
    return Rendered(found)


def render(
    prompt: Any,
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row: str = "",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Text that a reward model reads: prompt + completion; messages are ``Rendered`` by the chat template.

    Arguments of the template may come with the prompt, see ``with_arguments``.

    Raises:
        ModelError, DataError: see ``templated``.
    """
    prompt, arguments = split_arguments(prompt)
    if isinstance(prompt, str):
        return prompt + completion
    settings = template_settings(arguments) | dict(settings or {})
    return apply_template([*prompt, *completion], tokenizer, row=row, settings=settings)


def encode_reward_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text that a reward model reads, truncated to ``max_length`` tokens; see ``truncated``.

    Plain text gets the special tokens that the tokenizer adds before it and, if there is one, the end-of-sequence
    token once. ``Rendered`` text gets the special tokens of its template only, as in training; an encoder's tokenizer
    also adds its own on both sides, because an encoder reads its reward at the first token. The tokenizer's own
    ``truncation_side`` and ``padding_side`` have no effect.
    """
    eos = tokenizer.eos_token_id
    if of_encoder(tokenizer):
        room = max_length - (eos is not None)
        rows = truncated(tokenizer, [str(text) for text in texts], max_length=room)["input_ids"] if texts else []
        return [_ended(list(row), eos) for row in rows]
    ids: list[list[int]] = [[] for _ in texts]
    for kind in (True, False):
        places = [k for k, text in enumerate(texts) if isinstance(text, Rendered) == kind]
        rows = _encode_texts([str(texts[k]) for k in places], tokenizer, special=not kind)
        for k, row in zip(places, rows, strict=True):
            ids[k] = row[:max_length] if kind or eos is None else _ended(row[: max_length - 1], eos)
    return ids


def truncated(tokenizer: PreTrainedTokenizerBase, *texts: list[str], **settings: Any) -> Any:
    """What the tokenizer makes of lists of texts, truncated on the right whatever its own ``truncation_side``."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        return tokenizer(*texts, truncation=True, padding=False, **settings)
    finally:
        tokenizer.truncation_side = side


def encode_prompt(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row: str = "",
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt to complete: text with the special tokens that the tokenizer adds before it, messages with
    the generation prompt.

    Arguments of the template may come with the prompt, see ``with_arguments``.

    Raises:
        ModelError, DataError: see ``templated``.
    """
    prompt, arguments = split_arguments(prompt)
    if isinstance(prompt, str):
        return _encode_texts([prompt], tokenizer)[0]
    settings = template_settings(arguments) | dict(settings or {})
    return list(templated(prompt, tokenizer, generation_prompt=True, row=row, settings=settings))


def encode_pair(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PairIds:
    """Token ids of a pair as trl.DPOTrainer makes them: a plain response ends in the end-of-sequence token.

    Other than there, a tokenizer adds nothing after a text, so a response ends once, and nothing before a text that
    begins with it already. A response that the limit of tokens cut off (``FINISH_COLUMNS``) has no end: neither the
    end-of-sequence token nor what the chat template writes after a message, which the model has not written.

    The prompt ends where the tokens of prompt and response differ from those of the prompt alone. Its last tokens are
    ``unused`` if the tokenizer merges them with a response, or if the template ends a prompt without one differently.

    Args:
        pair: has ``prompt``, ``chosen``, ``rejected``; ``id`` names it in errors; see also ``template_settings``.
        tokenizer: of the policy.

    Raises:
        ModelError: a plain response cannot be ended; see also ``templated``.
        DataError: see ``templated`` and ``is_cut_off``.
    """
    row, settings = pair_name(pair), template_settings(pair)
    prompt = encode_prompt(pair["prompt"], tokenizer, row=row, settings=settings)
    both = []
    for side in RESPONSES:
        whole = pair["prompt"] + pair[side]
        cut_off = is_cut_off(pair, side)
        if isinstance(whole, str):
            both.append(_encode_plain(whole, tokenizer, end=not cut_off))
        else:
            both.append(
                templated(whole, tokenizer, generation_prompt=False, row=row, settings=settings, cut_off=cut_off)
            )
    start = min(shared_length(prompt, ids) for ids in both)
    return PairIds(prompt[:start], both[0][start:], both[1][start:], prompt[start:])


def tokenize_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = MAX_LENGTH,
    truncation: str = "keep_start",
    turns: Turns = "assistant",
) -> Dataset:
    """The table as ``encode_table`` makes it; nothing is truncated yet, see ``collate``.

    Args:
        pairs: pair table with ``id``.
        tokenizer: of the policy.
        max_length: tokens of prompt and response together that ``collate`` will keep; None: all.
        truncation: ``keep_start`` or ``keep_end``, as in trl.DPOConfig.
        turns: whose words count in responses of several messages.

    Raises:
        DataError: nothing of a response is left after truncation (names the pairs); see also ``encode_pair``.
        ModelError: see ``encode_pair``.
    """
    made = encode_table(pairs, tokenizer, turns=turns)
    read = [name for name in ("id", *ID_COLUMNS, *MASK_COLUMNS) if name in made.column_names]
    empty = [str(row["id"]) for row in made.select_columns(read) if not counted(row, max_length, truncation)]
    if empty:
        more = f" and {len(empty) - NAMED_PAIRS} more" if len(empty) > NAMED_PAIRS else ""
        raise DataError(
            f"pairs {', '.join(empty[:NAMED_PAIRS])}{more}: no token of a response is left within {max_length} tokens",
            code="empty-completion",
            hint="raise max_length, or leave these pairs out",
        )
    return made


def encode_table(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, turns: Turns = "assistant", processes: int | None = None
) -> Dataset:
    """The table with the columns ``ID_COLUMNS``, see ``encode_pair``; every pair is kept.

    Where responses hold several messages and ``turns`` is not ``all``, it also has ``MASK_COLUMNS``.

    Raises:
        ModelError, DataError: see ``encode_pair``.
    """
    warned = False
    log_cut_off(pairs)
    masked = turns != "all" and has_turns(pairs)

    def encode(pair: Mapping[str, Any]) -> dict[str, list[int]]:
        nonlocal warned
        ids = encode_pair(pair, tokenizer)
        if ids.unused and not warned:
            warned = True
            log.warning("%s, and perhaps others: the last tokens of its prompt, %r, differ before a response and "
                        "are left out", pair_name(pair) or "a pair", tokenizer.decode(ids.unused))  # fmt: skip
        masks = pair_masks(pair, ids[:3], tokenizer, turns) if masked else {}
        return dict(zip(ID_COLUMNS, ids[:3], strict=True)) | masks

    return pairs.map(encode, desc="tokenizing pairs", num_proc=processes)


def collate(
    rows: Dataset | list[dict[str, Any]],
    pad_token_id: int,
    *,
    max_length: int | None = MAX_LENGTH,
    truncation: str = "keep_start",
) -> dict[str, Tensor]:
    """Tokenized pairs as one right-padded batch in trl's layout, see ``PairCollator``."""
    from align.models.collator import PairCollator  # imports trl, which takes seconds

    collator = PairCollator(pad_token_id=pad_token_id, max_length=max_length, truncation_mode=truncation)
    columns = (*ID_COLUMNS, *MASK_COLUMNS)
    batch: dict[str, Tensor] = collator([{name: row[name] for name in columns if name in row} for row in rows])
    return batch


def pad(rows: Sequence[Sequence[int]], pad_token_id: int, *, left: bool = False) -> Padded:
    """Rows of token ids, at least one, padded to the longest: on the right, or on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        places = slice(width - len(row), width) if left else slice(0, len(row))
        ids[k, places] = torch.tensor(row, dtype=torch.long)
        mask[k, places] = 1
    return Padded(ids, mask)


def _encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = True) -> list[list[int]]:
    """Token ids of plain texts, not truncated.

    With ``special``, the tokens that the tokenizer adds before a text are there once, also if the text begins with them
    already. Those that it adds after a text (``add_eos_token``) are left out: a prompt goes on, and a response is ended
    by its caller.
    """
    rows = (
        [list(row) for row in tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]] if texts else []
    )
    if not special or not any(row and (row[0] in row[1:] or row[-1] in tokenizer.all_special_ids) for row in rows):
        return rows
    before, after = added_tokens(tokenizer)
    if after:
        rows = [row[: len(row) - len(after)] if row[-len(after) :] == after else row for row in rows]
    twice = [bool(before) and row[: 2 * len(before)] == 2 * before for row in rows]
    if any(twice):
        _warn_of_doubled(tokenizer.name_or_path, tokenizer.decode(before))
    return [row[len(before) :] if found else row for row, found in zip(rows, twice, strict=True)]


@functools.cache
def _warn_of_doubled(tokenizer: str, token: str) -> None:
    """Log, once for each tokenizer, that texts carry the tokens that it adds."""
    log.warning("%s: texts begin with %r, which the tokenizer adds as well: it is there once", tokenizer, token)


def _ended(row: list[int], eos: int | None) -> list[int]:
    """``row`` with the end-of-sequence token at its end, if there is such a token."""
    return row if eos is None or row[-1:] == [eos] else [*row, eos]


def _encode_plain(text: str, tokenizer: PreTrainedTokenizerBase, *, end: bool) -> list[int]:
    """Token ids of a plain prompt and response, with ``end`` ended by one end-of-sequence token.

    The token is written behind the text, as by trl. A tokenizer that reads special tokens in texts as plain characters
    (``split_special_tokens``) gets its id instead.
    """
    eos = _eos_token(tokenizer)
    ids = _encode_texts([text + eos if end and not text.endswith(eos) else text], tokenizer)[0]
    if not end or ids[-1:] == [tokenizer.eos_token_id]:
        return ids
    return [*_encode_texts([text], tokenizer)[0], int(tokenizer.eos_token_id)]


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, expected one to end responses",
            code="model-tokenizer",
            hint="name it in tokenizer_config.json (eos_token), or take the tokenizer that belongs to the model",
        )
    return str(tokenizer.eos_token)


def report_same_tokens(names: Sequence[str], count: int, where: str) -> None:
    """Log which of ``count`` pairs are left out of a training because a model reads the same tokens for both responses.

    Args:
        names: ids of these pairs; nothing is logged if there are none.
        count: number of all pairs.
        where: after which step they are the same.

    Raises:
        DataError: no pair is left.
    """
    if not names:
        return
    reason = f"their two responses are the same tokens {where}: {', '.join(names[:NAMED_PAIRS])}"
    reason += "" if len(names) <= NAMED_PAIRS else f" and {len(names) - NAMED_PAIRS} more"
    if len(names) == count:
        raise DataError(
            f"none of {count} pairs can be trained on: {reason}",
            code="same-responses",
            hint="read a pair as the model does with `align data check --model`; raise max_length, or look at what the "
            "template drops",
        )
    log.warning("%d of %d pairs are left out: %s", len(names), count, reason)
