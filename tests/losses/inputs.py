"""Inputs of the losses: pairs by their log-ratios, tokens of a pair, and any loss of the registry on such pairs."""

from typing import Any

import torch
from torch import Tensor

from align.losses.pairwise import PairLogps
from align.losses.registry import resolve
from align.losses.spec import BoundLoss
from align.losses.token_losses import PairTokens

LENGTHS = (10, 12)
"""Tokens of the chosen and of the rejected response in ``make`` and ``spread``."""


def make(values: list[tuple[float, float]], dtype: torch.dtype = torch.float64) -> PairLogps:
    """Pairs with the given (chosen ratio, rejected ratio) and a reference of -50."""
    chosen, rejected = torch.tensor(values, dtype=dtype).reshape(-1, 2).T
    reference = torch.full_like(chosen, -50.0)
    lengths = torch.full_like(chosen, LENGTHS[0])
    return PairLogps(
        (reference + chosen).requires_grad_(), (reference + rejected).requires_grad_(), reference, reference, lengths,
        lengths + LENGTHS[1] - LENGTHS[0],
    )  # fmt: skip


def hand_tokens(dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairTokens]:
    """A pair of two chosen and three rejected tokens with h = 2; u_w = 0 and u_l = -0.5; entropies of mean 0.4."""
    policy = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -2.0, -3.0]], dtype=dtype)
    reference = torch.tensor([[-1.5, -2.0, 0.0], [-1.0, -1.5, -2.0]], dtype=dtype)
    squares = torch.tensor([[-1.5, -1.5, 0.0], [-1.5, -1.5, -1.5]], dtype=dtype)
    entropy = torch.tensor([[0.2, 0.4, 0.0], [0.6, 0.3, 0.6]], dtype=dtype)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return with_tokens(policy, reference, mask, squares, entropy)


def with_tokens(
    policy: Tensor, reference: Tensor, mask: Tensor, squares: Tensor, entropy: Tensor, **drawn: Any
) -> tuple[PairLogps, PairTokens]:
    """The tokens of B pairs, each tensor [2B, T], and their sums."""
    sums = [value.sum(dim=1).chunk(2) for value in (policy * mask, reference * mask, mask)]
    (chosen, rejected), (ref_chosen, ref_rejected), lengths = sums
    logps = PairLogps(chosen, rejected, ref_chosen, ref_rejected, *lengths)
    return logps, PairTokens(mask, policy, squares, reference, entropy, **drawn)


def spread(logps: PairLogps) -> tuple[PairLogps, PairTokens]:
    """The same log-probs spread evenly over tokens; the sums are those of the tokens."""
    width = max(LENGTHS)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask = mask.repeat_interleave(len(logps.chosen), dim=0)
    length = mask.sum(dim=1, keepdim=True)
    sides = torch.cat([logps.chosen, logps.rejected]), torch.cat([logps.ref_chosen, logps.ref_rejected])
    policy, reference = (side[:, None] / length * mask for side in sides)
    squares, entropy = -3.0 * mask.to(policy.dtype), 0.3 * mask.to(policy.dtype)
    return with_tokens(policy, reference, mask, squares, entropy)


def statistics_of(loss: BoundLoss, logps: PairLogps, *, seed: int = 0, step: int = 0) -> dict[str, Tensor]:
    """Statistics of the first step of a training whose step is this batch."""
    found = {}
    for part in loss.parts:
        if part.spec.statistics is not None:
            statistic = part.spec.statistics(part.parameters, seed)
            found[part.spec.name] = statistic(statistic.columns(logps).detach().double(), step, update=True)[0]
    return found


def evaluate(loss: str | BoundLoss, logps: PairLogps, margin: Tensor | None = None, **parameters: Any) -> Tensor:
    """Any loss of the registry [B] on ``make``'s pairs, which are the step, spread evenly over tokens."""
    bound = resolve(loss, parameters) if isinstance(loss, str) else loss
    tokens = None
    if bound.spec.tokens != "none":
        logps, tokens = spread(logps)
    return bound(logps, margin, tokens=tokens, statistics=statistics_of(bound, logps))
