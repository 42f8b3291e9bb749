"""From texts and messages to token ids and masks, in one place.

A prompt or a response is text, or a list of messages, which go through the chat template of the tokenizer. Each use has
one function here: ``encode_prompt`` for sampling and log-probs of samples, ``encode_pair`` (over a table
``tokenize_pairs``, as a batch ``collate``) for policies, ``render`` with ``encode_reward_texts`` for reward models.
``pad`` makes a batch of any rows of ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from jinja2 import TemplateError, TemplateSyntaxError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config.columns import RESPONSES, TOKEN_IDS
from align.errors import DataError, ModelError
from align.io.console import log

MAX_LENGTH = 1024
"""Tokens of prompt and response together; trl.DPOConfig's default."""
SHOWN_CHARACTERS = 200
NAMED_PAIRS = 5
"""Pairs that a message names."""


class Rendered(str):
    """Text of a chat template, which has written the special tokens that it wants."""

    __slots__ = ()


class PairIds(NamedTuple):
    """Token ids of a pair; each response goes on where the prompt ends."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    unused: list[int]
    """End of the prompt's own tokens that does not stand before a response, see ``encode_pair``."""


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
) -> Rendered:
    """Messages as text, by the tokenizer's chat template.

    Args:
        messages: a conversation.
        tokenizer: has a chat template.
        generation_prompt: end with what begins the assistant's next message.
        row: name of the row that they come from, for errors: ``pair p1``.

    Raises:
        ModelError: there is no chat template, or it is not valid.
        DataError: the template refuses the messages.
    """
    return Rendered(_templated(messages, tokenizer, row=row, add_generation_prompt=generation_prompt, tokenize=False))


def render(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, *, row: str = "") -> str:
    """Text that a reward model reads: prompt + completion, where they are messages ``Rendered`` by the chat template.

    Raises:
        ModelError, DataError: see ``apply_template``.
    """
    if isinstance(prompt, str):
        return prompt + completion
    return apply_template([*prompt, *completion], tokenizer, row=row)


def encode_reward_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text that a reward model reads, truncated to ``max_length`` tokens; see ``truncated``.

    Plain text gets the special tokens that the tokenizer puts around it and the end-of-sequence token, if there is one.
    ``Rendered`` text gets none but those of its template, as in training, except from an encoder's tokenizer, because
    the encoder's reward is read at its first token.
    """
    bare = [isinstance(text, Rendered) and tokenizer.cls_token_id is None for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    eos = tokenizer.eos_token_id
    for kind in set(bare):
        room = max_length - (eos is not None and not kind)
        places = [k for k, is_bare in enumerate(bare) if is_bare == kind]
        chosen = [str(texts[k]) for k in places]
        rows = truncated(tokenizer, chosen, add_special_tokens=not kind, max_length=room)
        for k, row in zip(places, rows["input_ids"], strict=True):
            ids[k] = list(row)
    ended = [eos is None or is_bare or (row and row[-1] == eos) for row, is_bare in zip(ids, bare, strict=True)]
    return [row if is_ended else [*row, eos] for row, is_ended in zip(ids, ended, strict=True)]


def truncated(tokenizer: PreTrainedTokenizerBase, *texts: list[str], **settings: Any) -> Any:
    """What the tokenizer makes of lists of texts, truncated on the right whatever its own ``truncation_side``."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        return tokenizer(*texts, truncation=True, padding=False, **settings)
    finally:
        tokenizer.truncation_side = side


def encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, *, row: str = "") -> list[int]:
    """Token ids of a prompt to complete: text with the tokenizer's special tokens, messages with the generation prompt.

    Raises:
        ModelError, DataError: see ``apply_template``.
    """
    return _ids(prompt, tokenizer, row=row, add_generation_prompt=True)


def encode_pair(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PairIds:
    """Token ids of a pair as trl.DPOTrainer makes them: a plain response ends in the end-of-sequence token.

    The prompt ends where the tokens of prompt and response differ from those of the prompt alone. Its last tokens are
    ``unused`` where the tokenizer merges them with a response, or the template ends a prompt in another way.

    Args:
        pair: has ``prompt``, ``chosen``, ``rejected``; ``id`` names it in errors.
        tokenizer: of the policy.

    Raises:
        ModelError: a plain response cannot be ended; see also ``apply_template``.
        DataError: see ``apply_template``.
    """
    row = pair_name(pair)
    prompt = encode_prompt(pair["prompt"], tokenizer, row=row)
    both = []
    for side in RESPONSES:
        response = pair[side]
        if isinstance(response, str) and not response.endswith(_eos_token(tokenizer)):
            response += _eos_token(tokenizer)
        both.append(_ids(pair["prompt"] + response, tokenizer, row=row))
    start = min(_shared_length(prompt, ids) for ids in both)
    return PairIds(prompt[:start], both[0][start:], both[1][start:], prompt[start:])


def pair_name(pair: Mapping[str, Any]) -> str:
    """What errors call a row of a pair table; empty if it has no ``id``."""
    return "" if pair.get("id") is None else f"pair {pair['id']}"


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = MAX_LENGTH, truncation: str = "keep_start"
) -> Dataset:
    """The table with the columns ``TOKEN_IDS``, see ``encode_pair``; nothing is truncated yet, see ``collate``.

    Args:
        pairs: pair table with ``id``.
        tokenizer: of the policy.
        max_length: tokens of prompt and response together that ``collate`` will keep.
        truncation: ``keep_start`` or ``keep_end``, as in trl.DPOConfig.

    Raises:
        DataError: nothing of a response is left after truncation (names the pairs); see also ``encode_pair``.
        ModelError: see ``encode_pair``.
    """
    warned = False

    def encode(pair: Mapping[str, Any]) -> dict[str, list[int]]:
        nonlocal warned
        *ids, unused = encode_pair(pair, tokenizer)
        if unused and not warned:
            warned = True
            log.warning("pair %s, and perhaps others: the end of its prompt, %r, is read in another way before a "
                        "response and left out", pair["id"], tokenizer.decode(unused))  # fmt: skip
        return dict(zip(TOKEN_IDS, ids, strict=True))

    made = pairs.map(encode, desc="tokenizing pairs")
    room = max_length if truncation == "keep_start" else None
    empty = [
        str(row["id"])
        for row in made.select_columns(["id", *TOKEN_IDS])
        if not row["chosen_ids"] or not row["rejected_ids"] or (room is not None and len(row["prompt_ids"]) >= room)
    ]
    if empty:
        more = f" and {len(empty) - NAMED_PAIRS} more" if len(empty) > NAMED_PAIRS else ""
        raise DataError(
            f"pairs {', '.join(empty[:NAMED_PAIRS])}{more}: no token of a response is left within {max_length} tokens",
            code="empty-completion",
            hint="raise max_length, or leave these pairs out",
        )
    return made


def collate(
    rows: Dataset | list[dict[str, Any]],
    pad_token_id: int,
    *,
    max_length: int = MAX_LENGTH,
    truncation: str = "keep_start",
) -> dict[str, Tensor]:
    """Tokenized pairs as one right-padded batch in trl's layout, see ``PairCollator``."""
    from align.models.collator import PairCollator  # imports trl, which takes seconds

    collator = PairCollator(pad_token_id=pad_token_id, max_length=max_length, truncation_mode=truncation)
    batch: dict[str, Tensor] = collator([{name: row[name] for name in TOKEN_IDS} for row in rows])
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


def _ids(part: Any, tokenizer: PreTrainedTokenizerBase, *, row: str, **settings: Any) -> list[int]:
    """Token ids of text, or of messages by the chat template, whose ``settings`` text has no use for."""
    if isinstance(part, str):
        return list(tokenizer(part)["input_ids"])
    return list(_templated(part, tokenizer, row=row, return_dict=True, **settings)["input_ids"])


def _templated(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, row: str, **settings: Any
) -> Any:
    """``tokenizer.apply_chat_template``, whose errors name the row and repeat the words of the template."""
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: no chat template, and the texts are lists of messages",
            code="no-chat-template",
            hint="use a model with a chat template, or plain text",
        )
    try:
        return tokenizer.apply_chat_template(list(messages), **settings)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template is not valid (line {error.lineno}: {error.message})",
            code="chat-template",
            hint="repair the template in the model's folder, or take another model",
        ) from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        words = " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
        raise DataError(
            f"{row or repr(messages)[:SHOWN_CHARACTERS]}: the chat template of {tokenizer.name_or_path} does not take "
            f"these messages: {words}",
            code="chat-template",
            hint="change the messages or leave the row out, or take a model whose template takes them",
        ) from None


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, expected one to end responses",
            code="model-tokenizer",
            hint="name it in tokenizer_config.json (eos_token), or take the tokenizer that belongs to the model",
        )
    return str(tokenizer.eos_token)


def _shared_length(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that the two have in common."""
    return next((k for k, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                min(len(first), len(second)))  # fmt: skip
