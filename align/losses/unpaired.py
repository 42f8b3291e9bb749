"""Losses of single responses with thumbs, desirable or undesirable. Weight and mean are applied elsewhere.

Shapes: B responses, every tensor [B]; c = logp - ref of a response, thumb 1 or 0 (``PairLogps.thumb``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.pairwise import PairLogps


def thumb_of(logps: PairLogps) -> Tensor:
    """The thumbs [B] as bool; without a column all are desirable."""
    return torch.ones_like(logps.chosen_ratio, dtype=torch.bool) if logps.thumb is None else logps.thumb > 0.5


def kto(
    logps: PairLogps, statistics: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """desirable_weight (1 - s(beta (c - kl))), or undesirable_weight (1 - s(beta (kl - c))), [B].

    KTO, arXiv 2402.01306, eq. 7.

    Args:
        logps: of B responses.
        statistics: kl [B, 1], the step's estimate of KL(policy || reference), without gradient.
        beta: scale of c.
        desirable_weight: factor of the loss of desirable responses.
        undesirable_weight: factor of that of the others.
    """
    gap = beta * (logps.chosen_ratio - statistics[:, 0].detach().to(logps.chosen_ratio))
    desirable, undesirable = 1 - torch.sigmoid(gap), 1 - torch.sigmoid(-gap)
    return torch.where(thumb_of(logps), desirable_weight * desirable, undesirable_weight * undesirable)


def bco_unpaired(
    logps: PairLogps, statistics: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """desirable_weight -log s(beta c - d), or undesirable_weight -log s(d - beta c) (BCO, arXiv 2404.04656, eq. 6).

    Args:
        logps: of B responses.
        statistics: d [B, 1], the mean reward so far, without gradient.
        beta: scale of c.
        desirable_weight: factor of the loss of desirable responses.
        undesirable_weight: factor of that of the others.
    """
    gap = beta * logps.chosen_ratio - statistics[:, 0].detach().to(logps.chosen_ratio)
    return torch.where(thumb_of(logps), -desirable_weight * F.logsigmoid(gap), -undesirable_weight * F.logsigmoid(-gap))
