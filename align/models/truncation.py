"""The distribution that a token is sampled from: softmax(logits / temperature), cut by min-p, top-k and top-p.

Each cut keeps the tokens whose score is at least some floor, so that several cuts keep those above the highest floor.
They apply in this order, each to what the one before it left: min-p, top-k, top-p. Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUCLEUS_TOKENS = 2048
"""Tokens that a nucleus is looked for in before all are sorted; it rarely has as many."""


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
            slack: twice the rounding error that a score may have. Above 0: the floor of the tokens that are kept
                whatever the errors are, so that the best token left out is this far below it; below 0: that of the
                tokens that some errors keep.
        """
        floor = scores.new_full((len(scores), 1), -torch.inf)
        if self.min_p > 0:
            floor = scores.amax(dim=-1, keepdim=True) + math.log(self.min_p) + slack
        if 0 < self.top_k < scores.shape[1]:
            last = self.top_k + 1 if slack > 0 else self.top_k
            floor = torch.maximum(floor, scores.topk(last, dim=-1).values[:, -1:] + slack)
        if self.top_p < 1:
            left = scores.masked_fill(scores < floor, -torch.inf)
            nucleus = _nucleus_floor if slack == 0 else _nucleus_floor_with_slack
            floor = torch.maximum(floor, nucleus(left, self.top_p - slack, outside=slack > 0) + slack)
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


def _nucleus_floor(scores: Tensor, mass: float, *, outside: bool) -> Tensor:
    """The lowest score [B, 1] in the smallest set of top tokens with probability at least ``mass``.

    ``outside``: the highest score that is not in it, -inf if all are.
    """
    return _border(scores.sort(dim=-1, descending=True).values, None, mass, outside=outside)


def _nucleus_floor_with_slack(scores: Tensor, mass: float, *, outside: bool) -> Tensor:
    """``_nucleus_floor`` up to rounding of ``mass``; all scores are sorted only in rows with a large nucleus."""
    if scores.shape[1] <= NUCLEUS_TOKENS:
        return _nucleus_floor(scores, mass, outside=outside)
    top = scores.topk(NUCLEUS_TOKENS, dim=-1).values
    found = _border(top, scores.logsumexp(dim=-1, keepdim=True), mass, outside=outside)
    beyond = (found <= top[:, -1:]).flatten().nonzero().flatten()
    if len(beyond):
        found[beyond] = _nucleus_floor(scores[beyond], mass, outside=outside)
    return found


def _border(ordered: Tensor, log_total: Tensor | None, mass: float, *, outside: bool) -> Tensor:
    """See ``_nucleus_floor``: ``ordered`` [B, W], the top scores, descending, and log sum exp of all, [B, 1]; None if
    they are all there are."""
    p = torch.softmax(ordered, dim=-1) if log_total is None else (ordered - log_total).exp()
    before = p.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    count = (before < mass).sum(dim=-1, keepdim=True).clamp_min(1)
    if not outside:
        return ordered.gather(1, count - 1)
    return nn.functional.pad(ordered, (0, 1), value=-torch.inf).gather(1, count)
