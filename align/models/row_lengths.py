"""Whether pairs fit the learned positions of a model; needs its configuration and tokenizer, no weights."""

from functools import cache

import torch
from datasets import Dataset

from align.errors import DataError, ModelError, listed
from align.models.folders import adapter_base
from align.models.loading import load_tokenizer
from align.models.pair_rows import pair_name
from align.models.positions import check_padding, learned_positions
from align.models.tokenization import encode_pair


@cache
def positions_of(model: str, trust_remote_code: bool = False) -> int | None:
    """Number of learned absolute positions of a model, an adapter's base; None for other models and unknown ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = adapter_base(model) or model
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return learned_positions(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, ImportError, NotImplementedError):
        return None  # what cannot be loaded is refused with its reason by the check of the model


def beyond_positions(
    pairs: Dataset, model: str, max_length: int | None, *, trust_remote_code: bool = False, multiple: int | None = None
) -> tuple[list[str], int]:
    """The pairs that a model has no positions for, with their tokens, and its number of positions.

    Pairs that nothing tells apart as tokens are passed over: training leaves them out.

    Args:
        pairs: a pair table.
        model: folder (an adapter's too) or hub id.
        max_length: tokens of prompt and response that are kept; None: all.
        trust_remote_code: whether code that comes with the model may run.
        multiple: trl's ``pad_to_multiple_of``.

    Returns:
        ``["pair 3: found 1100 tokens", ...]`` in the order of the table, and the positions, 0 if the model sets none.

    Raises:
        DataError: see ``check_padding``.
    """
    limit = positions_of(model, trust_remote_code)
    if limit is None or (max_length is not None and max_length <= limit and not multiple):
        return [], limit or 0
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    found, longest = [], 0
    for row in pairs:
        try:
            ids = encode_pair(row, tokenizer)
        except (DataError, ModelError):
            continue  # named by the check of the templates
        length = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
        length = length if max_length is None else min(length, max_length)
        if ids.chosen == ids.rejected:
            continue
        longest = max(longest, length)
        if length > limit:
            found.append(f"{pair_name(row)}: found {length} tokens")
    if not found:
        check_padding(limit, longest, multiple)
    return found, limit


def check_lengths_of(
    pairs: Dataset, model: str, max_length: int | None, *, trust_remote_code: bool = False, multiple: int | None = None
) -> None:
    """Refuse pairs that a model has no positions for before it loads; see ``beyond_positions``.

    Raises:
        DataError: some are too long (the first 20 and a count), or padding makes them so.
    """
    found, limit = beyond_positions(pairs, model, max_length, trust_remote_code=trust_remote_code, multiple=multiple)
    if found:
        raise DataError(
            f"{len(found)} of {len(pairs)} pairs are longer than the {limit} positions of {model}:\n{listed(found)}",
            code="positions",
            hint=f"set train.trainer.max_length: {limit}, which cuts them off, or leave them out",
        )
