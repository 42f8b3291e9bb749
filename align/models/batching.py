"""Batches of sequences under a token budget."""

from collections.abc import Sequence
from typing import Any

from align.models.logps import Layout
from align.models.packing import packed_tokens


def token_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Split the indices 0..N-1 into batches of at most ``budget`` tokens, longest sequences first.

    Args:
        lengths: [N], in tokens.
        budget: tokens per batch; a longer sequence is a batch of its own.
        padded: count the tokens of a batch as rows x its longest row, else as the sum of its rows.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        cost = lengths[batches[-1][0]] if padded and used else lengths[index]
        if not used or used + cost > budget:
            batches.append([])
            used, cost = 0, lengths[index]
        batches[-1].append(index)
        used += max(cost, 1)
    return batches


def in_so_many(batches: Sequence[list[int]], count: int) -> list[list[int]]:
    """The same indices in at least ``count`` batches: the largest one is halved until there are enough.

    Raises:
        ValueError: fewer indices than ``count``.
    """
    parts = list(batches)
    if sum(map(len, parts)) < count:
        raise ValueError(f"{sum(map(len, parts))} indices cannot make {count} batches")
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda k: len(parts[k]))
        whole = parts.pop(largest)
        parts += [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return parts


def pair_batches(inputs: dict[str, Any], layout: Layout, budget: int) -> list[list[int]]:
    """Indices of the pairs of a batch, each in exactly one micro-batch of at most ``budget`` tokens, longest first.

    Args:
        inputs: a batch of B pairs as ``PairCollator`` makes it.
        layout: layout of the forward pass, which determines the tokens of a pair.
        budget: tokens per micro-batch; a pair that is longer is a micro-batch of its own.
    """
    if layout == "shared_prefix":
        return token_batches(packed_tokens(inputs).tolist(), budget, padded=False)
    longest = inputs["attention_mask"].sum(dim=1).view(2, -1).amax(dim=0)
    return token_batches((2 * longest).tolist(), budget)
