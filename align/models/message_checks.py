"""Whether chat templates take the messages of every row, and what becomes of pairs as tokens; needs no weights."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.config.columns import RESPONSES, THUMB
from align.data.messages import split_arguments
from align.errors import DataError, listed
from align.models.chat_template import template_settings
from align.models.folders import reads_sentence_pairs
from align.models.loading import load_tokenizer
from align.models.pair_rows import pair_name
from align.models.special_tokens import added_tokens
from align.models.tokenization import apply_template, encode_pair, encode_reward_texts, render
from align.models.turns import Turns, has_turns, pair_masks

ANSWER = [{"role": "assistant", "content": "an answer"}]
LONGEST = 1_000_000
"""Tokens that no text has: nothing is truncated."""
BATCH = 1000


class AsTokens(NamedTuple):
    """What becomes of pairs as tokens, see ``survey_pairs``."""

    same: list[str]
    """Ids of the pairs whose two responses become the same tokens."""
    begun: list[str]
    """Ids of the pairs of plain text that begin with what the tokenizer adds before a text."""
    before: str
    """What the tokenizer adds before a text."""
    tokens: int = 0
    """Tokens of all responses, if some of these hold several messages."""
    others: int = 0
    """Those of them that are not the assistant's words, see align/models/turns.py."""


def is_conversational(pairs: Dataset) -> bool:
    """Whether the texts of a pair table are lists of messages."""
    return len(pairs) > 0 and not isinstance(pairs[0]["prompt"], str)


def check_pairs_of(
    pairs: Dataset, models: Iterable[str], *, trust_remote_code: bool = False, text_pair: bool = False
) -> None:
    """Check that the chat template of each model takes the messages of every pair, as prompt and with each response.

    Nothing is checked for a model that reads sentence pairs (``text_pair``, or its config.json says so), because it
    reads messages as plain text.

    Raises:
        ModelError: a model has no valid chat template.
        DataError: a template refuses rows (the first 20 and a count, with the template's words).
    """
    if text_pair or not is_conversational(pairs):
        return
    for model in itertools.filterfalse(reads_sentence_pairs, models):
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        check_rows(pairs, partial(_render_pair, tokenizer=tokenizer), model)


def check_prompts_of(
    prompts: Sequence[Any],
    models: Iterable[str],
    *,
    answered: bool = False,
    trust_remote_code: bool = False,
    text_pair: bool = False,
) -> None:
    """``check_pairs_of`` for prompts alone; with ``answered`` each is followed by an answer, as a scorer reads it.

    Raises:
        ModelError, DataError: see ``check_pairs_of``.
    """
    rows = [{"id": None, "prompt": prompt} for prompt in prompts if not isinstance(prompt, str)]
    if text_pair or not rows:
        return
    for model in itertools.filterfalse(reads_sentence_pairs, models):
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)

        def read(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase = tokenizer) -> None:
            messages, arguments = split_arguments(row["prompt"])
            turns, settings = [*messages, *(ANSWER if answered else [])], template_settings(arguments)
            apply_template(turns, tokenizer, generation_prompt=not answered, settings=settings)

        check_rows(rows, read, model)


def check_rows(rows: Iterable[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any], model: str) -> None:
    """Call ``read`` for every row and raise one error for all rows that a template refuses.

    Raises:
        DataError: see above; errors of other kinds pass.
    """
    found: list[DataError] = []
    count = 0
    for row in rows:
        count += 1
        try:
            read(row)
        except DataError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise DataError(
            f"{len(found)} of {count} rows cannot be read by {model}:\n{listed([error.message for error in found])}",
            code=found[0].code,
            hint=found[0].hint,
        )


def _render_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of prompt + chosen and of prompt + rejected; the prompt alone is rendered as well."""
    name, settings = pair_name(row), template_settings(row)
    if not isinstance(row["prompt"], str):
        apply_template(row["prompt"], tokenizer, generation_prompt=True, row=name, settings=settings)
    return [render(row["prompt"], row[side], tokenizer, row=name, settings=settings) for side in RESPONSES]


def survey_pairs(pairs: Dataset, model: str) -> AsTokens:
    """Pairs as tokens of a model's tokenizer.

    Raises:
        ModelError, DataError: see ``check_pairs_of``.
    """
    tokenizer = load_tokenizer(model)
    check_pairs_of(pairs, [model])
    first = added_tokens(tokenizer)[0]
    same, begun = [], []
    for start in range(0, len(pairs), BATCH):
        rows = list(pairs.select(range(start, min(start + BATCH, len(pairs)))))
        texts = [text for row in rows for text in _render_pair(row, tokenizer)]
        ids = encode_reward_texts(texts, tokenizer, LONGEST)
        same += [
            str(row["id"]) for k, row in enumerate(rows) if row.get(THUMB) is None and ids[2 * k] == ids[2 * k + 1]
        ]
        plain = [row for row in rows if isinstance(row["prompt"], str)] if first else []
        bare = tokenizer([row["prompt"] for row in plain], add_special_tokens=False)["input_ids"] if plain else []
        begun += [str(row["id"]) for row, its in zip(plain, bare, strict=True) if list(its[: len(first)]) == first]
    return AsTokens(same, begun, tokenizer.decode(first), *_others(pairs, tokenizer))


def check_turns_of(pairs: Dataset, model: str, turns: Turns, *, trust_remote_code: bool = False) -> None:
    """Check that the words of the assistant can be told from those of others in responses of several messages.

    Raises:
        ModelError: the model has no valid chat template.
        DataError: they cannot in some rows (the first 20 and a count).
    """
    if turns == "all" or not has_turns(pairs):
        return
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    rows = (row for row in pairs if len(row["chosen"]) > 1 or len(row["rejected"]) > 1)
    check_rows(rows, lambda row: pair_masks(row, encode_pair(row, tokenizer)[:3], tokenizer, turns), model)


def _others(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(Tokens of all responses, those of others than the assistant); zeros if every response is one message."""
    if not has_turns(pairs):
        return 0, 0
    tokens = own = 0
    for row in pairs:
        masks = pair_masks(row, encode_pair(row, tokenizer)[:3], tokenizer)
        tokens += sum(map(len, masks.values()))
        own += sum(map(sum, masks.values()))
    return tokens, tokens - own
