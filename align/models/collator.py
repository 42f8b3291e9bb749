"""Batches of preference pairs: trl's layout plus numbers per pair."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from align.config.columns import PAIR_COLUMNS

ROW = "row"
"""Batch key: index of the pair in the training table, int64 [B]."""


@dataclass
class PairCollator(DataCollatorForPreference):
    """trl's preference collator plus one number per pair for each column of ``PAIR_COLUMNS`` that the examples have.

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


REAL = "real"
"""Batch key: bool [B], False for duplicates that only fill the last batch; absent if there are none."""


def counted(batch: dict[str, Any]) -> int:
    """Number of real pairs in a batch, see ``REAL``."""
    return int(batch[REAL].sum()) if REAL in batch else _pairs(batch)


def only_real(values: Tensor, real: Tensor | None) -> Tensor:
    """The rows of ``values`` that belong to real pairs; all rows if ``real`` is None."""
    return values if real is None else values[real]


def _pairs(batch: dict[str, Any]) -> int:
    return int(batch["input_ids"].shape[0]) // 2
