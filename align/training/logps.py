"""How the log-probabilities of a batch of pairs are computed.

Shapes: B pairs, T padded tokens of the longest of the 2B sequences.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

NOT_MODEL_INPUTS = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "margin", "weight"})


class SequenceLogps(NamedTuple):
    """Log-probabilities of the completions of one batch under one model."""

    chosen: Tensor
    """[B], nats, summed over completion tokens."""
    rejected: Tensor
    """[B], nats, summed over completion tokens."""
    chosen_length: Tensor
    """[B], completion tokens."""
    rejected_length: Tensor
    """[B], completion tokens."""
    outputs: Any
    """What trl's fused head returned: per-token entropy, mean logits, top-1 hits, each [2B, T - 1]."""


def concatenated(model: torch.nn.Module, batch: dict[str, Any]) -> SequenceLogps:
    """Log-probabilities in trl's layout: chosen rows first, rejected rows after them, one forward pass.

    Args:
        model: causal language model whose forward trl has given a fused head (``DPOTrainer`` does so).
        batch: as ``PairCollator`` makes it.
    """
    mask = batch["completion_mask"]
    inputs = {key: value for key, value in batch.items() if key not in NOT_MODEL_INPUTS}
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    logps = outputs.log_probs[:, -(mask.shape[1] - 1) :].sum(dim=1)
    chosen, rejected = logps.chunk(2)
    chosen_length, rejected_length = mask[:, 1:].sum(dim=1).chunk(2)
    return SequenceLogps(chosen, rejected, chosen_length, rejected_length, outputs)
