"""The distribution that a token is sampled from: softmax(logits / temperature), cut by min-p, top-k and top-p.

Each cut keeps the tokens whose score is at least some floor, so that several cuts keep those above the highest floor.
They apply in this order, each to what the one before it left: min-p, top-k, top-p. Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens may be sampled."""

    top_p: float = 1.0
    """The most probable tokens, up to and including the one at which their probability reaches ``top_p``; 1: all."""
    top_k: int = 0
    """The k most probable tokens, and those as probable as the last of them; 0: all."""
    min_p: float = 0.0
    """Tokens at least ``min_p`` times as probable as the most probable one; 0: all."""

    @property
    def cuts(self) -> bool:
        """Whether any token is left out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def floor(self, scores: Tensor, slack: float = 0.0) -> Tensor:
        """The lowest score that may be sampled, [B, 1]; -inf without a cut.

        Args:
            scores: logits / temperature [B, V].
            slack: moves each cut by as much as it moves if every score may be off by half of this, towards fewer
                tokens; towards more if it is negative.
        """
        floor = scores.new_full((len(scores), 1), -torch.inf)
        if self.min_p > 0:
            floor = scores.amax(dim=-1, keepdim=True) + math.log(self.min_p) + slack
        if 0 < self.top_k < scores.shape[1]:
            floor = torch.maximum(floor, scores.topk(self.top_k, dim=-1).values[:, -1:] + slack)
        if self.top_p < 1:
            left = scores.masked_fill(scores < floor, -torch.inf)
            floor = torch.maximum(floor, _nucleus_floor(left, self.top_p - slack) + slack)
        return floor


def sampled_logps(scores: Tensor, truncation: Truncation, targets: Tensor) -> Tensor:
    """Log-probs (nats) of the distribution that is sampled from, [B, V]; -inf for a token that cannot be.

    Args:
        scores: logits / temperature [B, V].
        truncation: the cuts.
        targets: tokens that were sampled, int64 [B]. They count as kept: rounding may put one on the other side of a
            cut.
    """
    if truncation.cuts:
        kept = scores >= truncation.floor(scores)
        kept.scatter_(1, targets[:, None], True)
        scores = scores.masked_fill(~kept, -torch.inf)
    return torch.log_softmax(scores, dim=-1)


def _nucleus_floor(scores: Tensor, mass: float) -> Tensor:
    """The lowest score [B, 1] in the smallest set of top tokens with probability at least ``mass``."""
    ordered = scores.sort(dim=-1, descending=True).values
    before = torch.softmax(ordered, dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    count = (before < mass).sum(dim=-1, keepdim=True).clamp_min(1)
    return ordered.gather(1, count - 1)
