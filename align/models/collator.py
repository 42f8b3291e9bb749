"""Batches of preference pairs: trl's layout plus numbers per pair."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from align.config.columns import MASK_COLUMNS, PAIR_COLUMNS

ROW = "row"
"""Batch key: index of the pair in the training table, int64 [B]."""


@dataclass
class PairCollator(DataCollatorForPreference):
    """trl's preference collator plus one number per pair for each column of ``PAIR_COLUMNS`` that the examples have.

    Row k of the first half of ``input_ids`` [2B, T] is the chosen, row B + k the rejected response of pair k;
    ``margin``, ``weight`` and ``trust`` are float32 [B] in the same order, ``row`` is int64 [B]. ``completion_mask``
    [2B, T] is 0 for tokens of responses that ``MASK_COLUMNS`` leave out.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``; see the class."""
        batch: dict[str, Any] = super().torch_call(examples)
        if MASK_COLUMNS[0] in examples[0]:
            self._leave_out(examples, batch["completion_mask"])
        for column in PAIR_COLUMNS:
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([example[ROW] for example in examples])
        return batch

    def _leave_out(self, examples: list[dict[str, Any]], mask: Tensor) -> None:
        """Set the tokens to 0 that do not count, with the truncation of trl's collator."""
        rows = [
            [0] * len(example["prompt_ids"]) + list(example[column]) for column in MASK_COLUMNS for example in examples
        ]
        kept = slice(None) if self.max_length is None else slice(self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            kept = slice(-self.max_length, None)
        for k, row in enumerate(rows):
            mask[k, : len(row[kept])] = torch.tensor(row[kept], dtype=mask.dtype)

    @classmethod
    def of(cls, collator: DataCollatorForPreference) -> "PairCollator":
        """A collator with the settings of trl's."""
        return cls(**{one.name: getattr(collator, one.name) for one in fields(collator) if one.init})


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
