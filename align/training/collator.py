"""Batches of preference pairs: trl's layout, with the margin and the weight of each pair beside it."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

PAIR_COLUMNS = ("margin", "weight", "trust")
ROW = "row"
"""Which row of the training table a pair is."""


@dataclass
class PairCollator(DataCollatorForPreference):
    """trl's preference collator plus one number per pair from each of ``PAIR_COLUMNS`` that the examples carry.

    Row k of the first half of ``input_ids`` [2B, T] is the chosen, row B + k the rejected response of pair k;
    ``margin``, ``weight`` and ``trust`` are float32 [B] in the same order, ``row`` is int64 [B].
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``; see the class."""
        batch: dict[str, Any] = super().torch_call(examples)
        for column in PAIR_COLUMNS:
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([example[ROW] for example in examples])
        return batch
