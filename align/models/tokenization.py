"""Pairs as the trainer sees them: the same tokens, the same truncation."""

from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from align.errors import DataError, ModelError
from align.models.collator import PairCollator

MAX_LENGTH = 1024
"""Tokens of prompt and response together; trl.DPOConfig's default."""


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int = MAX_LENGTH, truncation: str = "keep_start"
) -> Dataset:
    """The table with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, by trl's own preparation.

    Args:
        pairs: pair table with ``id``.
        tokenizer: of the policy.
        max_length: tokens of prompt and response together; what is beyond is cut.
        truncation: ``keep_start`` or ``keep_end``, as in trl.DPOConfig.

    Raises:
        DataError: nothing of a response is left after truncation; names the pairs.
        ModelError: plain text, and the tokenizer has no token that ends it.
    """
    if tokenizer.eos_token is None and isinstance(pairs[0]["prompt"], str):
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, expected one to end responses",
            code="model-tokenizer",
            hint="name it in tokenizer_config.json (eos_token), or take the tokenizer that belongs to the model",
        )
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode=truncation)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    made = DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, settings, "pairs")
    room = max_length if truncation == "keep_start" else None
    empty = [
        str(row["id"])
        for row in made
        if not row["chosen_ids"] or not row["rejected_ids"] or (room is not None and len(row["prompt_ids"]) >= room)
    ]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"pairs {shown}: no token of a response is left within {max_length} tokens",
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
) -> dict[str, torch.Tensor]:
    """Tokenized pairs as one right-padded batch in trl's layout; chosen rows first."""
    collator = PairCollator(pad_token_id=pad_token_id, max_length=max_length, truncation_mode=truncation)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch: dict[str, torch.Tensor] = collator([{name: row[name] for name in columns} for row in rows])
    return batch
