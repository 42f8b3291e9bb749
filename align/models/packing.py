"""A batch of pairs packed into one row of tokens that holds the common prefix of each pair once.

Legend: B pairs, T padded tokens of the longest of the 2B sequences, N packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """N tokens that stand for 2B sequences, and the indices of each sequence's tokens.

    The common prefix of the chosen and the rejected sequence of a pair (the prompt, and what the responses have in
    common at their start) is packed once: a causal model gives it the same hidden states in both sequences.
    """

    input_ids: Tensor
    """[1, N]."""
    position_ids: Tensor
    """[1, N], position of each token in its sequence."""
    source: Tensor
    """[2B, T], packed index of the token at each position of each sequence; 0 for padding."""
    own: Tensor
    """[N], index of each packed token in the flattened [2B * T] sequences."""
    longest: int
    """T, tokens of the longest sequence."""


def pack(batch: dict[str, Any]) -> PackedPairs:
    """Pack a right-padded batch in trl's layout (``PairCollator``): rows k and B + k are a pair."""
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    shared = shared_start(batch)
    rows, longest = ids.shape
    position = torch.arange(longest, device=ids.device)
    duplicate = torch.zeros_like(valid)
    duplicate[rows // 2 :] = position < shared[:, None]
    own = valid & ~duplicate
    source = own.flatten().cumsum(0).sub(1).view(rows, longest)
    source[rows // 2 :] = torch.where(duplicate[rows // 2 :], source[: rows // 2], source[rows // 2 :])
    return PackedPairs(
        input_ids=ids[own][None],
        position_ids=position.expand(rows, longest)[own][None],
        source=source.masked_fill(~valid, 0),
        own=own.flatten().nonzero().squeeze(1),
        longest=longest,
    )


def shared_start(batch: dict[str, Any]) -> Tensor:
    """Length, int64 [B], of the common prefix of each pair's two sequences, in tokens."""
    ids, valid, completion = batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool()
    half = ids.shape[0] // 2
    same = (ids[:half] == ids[half:]) & valid[:half] & valid[half:] & (completion[:half] == completion[half:])
    return same.cumprod(dim=1).sum(dim=1)


def packed_tokens(batch: dict[str, Any]) -> Tensor:
    """Number of tokens, int64 [B], of each pair when packed."""
    lengths = batch["attention_mask"].sum(dim=1)
    half = lengths.shape[0] // 2
    return lengths[:half] + lengths[half:] - shared_start(batch)
