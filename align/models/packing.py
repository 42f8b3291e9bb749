"""A batch of pairs packed into one row of tokens that holds each common prefix of its sequences once.

Legend: B pairs, T padded tokens of the longest of the R = 2B sequences, N packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """N tokens that stand for 2B sequences, and the indices of each sequence's tokens.

    A prefix that sequences have in common is packed once, for a causal model gives it the same hidden states in all of
    them: the prompt of a pair and the common beginning of its responses, and what several pairs of a prompt share,
    whole responses too.
    """

    input_ids: Tensor
    """[1, N]."""
    position_ids: Tensor
    """[1, N], position of each token in its sequence."""
    source: Tensor
    """[2B, T], packed index of the token at each position of each sequence; 0 for padding."""
    own: Tensor
    """[N], index of each packed token in the flattened [2B * T] sequences."""
    owner: Tensor
    """[2B, T], index in the flattened sequences of the token that is packed for each; its own for padding."""
    longest: int
    """T, tokens of the longest sequence."""


def pack(batch: dict[str, Any]) -> PackedPairs:
    """Pack a right-padded batch in trl's layout (``PairCollator``): rows k and B + k are a pair."""
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    owner = _owners(ids, valid, batch["completion_mask"].bool())
    rows, longest = ids.shape
    place = torch.arange(rows * longest, device=ids.device).view(rows, longest)
    own = valid & (owner == place)
    packed = own.flatten().cumsum(0).sub(1)
    return PackedPairs(
        input_ids=ids[own][None],
        position_ids=(place % longest)[own][None],
        source=packed[owner].masked_fill(~valid, 0),
        own=own.flatten().nonzero().squeeze(1),
        owner=owner,
        longest=longest,
    )


def _owners(ids: Tensor, valid: Tensor, completion: Tensor) -> Tensor:
    """For each token, the same token of the first sequence that is the same up to it, as ``PackedPairs.owner``.

    Sequences whose completions begin at other places are not the same, for other tokens of them are scored.
    """
    rows, longest = ids.shape
    position = torch.arange(longest, device=ids.device)
    marked = 2 * ids + completion
    first = torch.empty_like(ids)
    for row in range(rows):
        before = slice(0, row + 1)
        same = (marked[before] == marked[row]) & valid[before] & valid[row]
        common = same.cumprod(dim=1).sum(dim=1)  # tokens that this sequence shares with each one before it
        first[row] = (common[:, None] > position).to(torch.uint8).argmax(dim=0)
        first[row][~valid[row]] = row
    return first * longest + position


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
