"""A batch of pairs as one row of tokens in which everything that both responses start with stands once.

Legend: B pairs, T padded tokens of the longest of the 2B sequences, N packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """N tokens that stand for 2B sequences, and where each sequence finds its tokens.

    The common start of the chosen and the rejected sequence of a pair (the prompt, and the responses' own common
    start) is there once: a causal model gives it the same hidden states in both.
    """

    input_ids: Tensor
    """[1, N]."""
    position_ids: Tensor
    """[1, N], position of each token in its own sequence."""
    source: Tensor
    """[2B, T], packed index of the token at each place of each sequence; 0 where there is none."""
    own: Tensor
    """[N], place in the flattened [2B * T] sequences that a packed token comes from."""
    longest: int
    """T."""


def pack(batch: dict[str, Any]) -> PackedPairs:
    """Pack a right-padded batch in trl's layout (``PairCollator``): rows k and B + k are a pair."""
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    shared = shared_start(batch)
    rows, longest = ids.shape
    place = torch.arange(longest, device=ids.device)
    duplicate = torch.zeros_like(valid)
    duplicate[rows // 2 :] = place < shared[:, None]
    own = valid & ~duplicate
    source = own.flatten().cumsum(0).sub(1).view(rows, longest)
    source[rows // 2 :] = torch.where(duplicate[rows // 2 :], source[: rows // 2], source[rows // 2 :])
    return PackedPairs(
        input_ids=ids[own][None],
        position_ids=place.expand(rows, longest)[own][None],
        source=source.masked_fill(~valid, 0),
        own=own.flatten().nonzero().squeeze(1),
        longest=longest,
    )


def shared_start(batch: dict[str, Any]) -> Tensor:
    """Tokens [B] that the chosen and the rejected sequence of each pair have in common from the first on."""
    ids, valid, completion = batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool()
    half = ids.shape[0] // 2
    same = (ids[:half] == ids[half:]) & valid[:half] & valid[half:] & (completion[:half] == completion[half:])
    return same.cumprod(dim=1).sum(dim=1)


def packed_tokens(batch: dict[str, Any]) -> Tensor:
    """Tokens [B] that each pair takes when packed."""
    lengths = batch["attention_mask"].sum(dim=1)
    half = lengths.shape[0] // 2
    return lengths[:half] + lengths[half:] - shared_start(batch)
