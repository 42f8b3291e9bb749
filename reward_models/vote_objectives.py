"""Objectives of a reward model that read the votes of raters, ties included. Pure functions, one value per pair.

Shapes: B pairs; rewards are [B], z = r_w - r_l; votes_chosen a, votes_rejected b, votes_tie t are [B], n = a + b + t.
Each loss is the negative log-likelihood per vote, so that n votes of n for the chosen are a hard label: at no tie it is
Bradley-Terry's loss. With ``by_votes`` it is that of all n votes, so a pair counts as often as it was judged.

    objective     P(tie)                                                   source
    binomial      none; a tie is half a vote for each                      Bradley and Terry (1952), k of n
    rao_kupper    1 - s(z - d) - s(-z - d), d the lead that is noticed     Rao and Kupper (1967), d = log of their theta
    davidson      proportional to v sqrt(P_w P_l)                          Davidson (1970)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.numerics import at_least_float32


def binomial(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    votes_chosen: Tensor,
    votes_rejected: Tensor,
    votes_tie: Tensor,
    *,
    by_votes: bool = False,
) -> Tensor:
    """-((a + t/2) log s(z) + (b + t/2) log s(-z)), divided by n unless ``by_votes``, [B]."""
    gap = _gap(reward_chosen, reward_rejected)
    votes = [one.to(gap) for one in (votes_chosen, votes_rejected, votes_tie)]
    chosen, rejected = votes[0] + votes[2] / 2, votes[1] + votes[2] / 2
    loss = -chosen * F.logsigmoid(gap) - rejected * F.logsigmoid(-gap)
    return loss if by_votes else loss / (chosen + rejected)


def rao_kupper(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    votes_chosen: Tensor,
    votes_rejected: Tensor,
    votes_tie: Tensor,
    *,
    tie: float | Tensor = 0.5,
    by_votes: bool = False,
) -> Tensor:
    """-(a log P_w + b log P_l + t log P_t), divided by n unless ``by_votes``, [B].

    P_w = s(z - d), P_l = s(-z - d), P_t = (e^2d - 1) P_w P_l: a lead of less than d is not noticed. At d = 0 there are
    no ties and P_w is Bradley and Terry's.

    Args:
        reward_chosen: [B].
        reward_rejected: [B].
        votes_chosen: [B].
        votes_rejected: [B].
        votes_tie: [B].
        tie: d, at least 0, above 0 if there are ties; in units of the reward.
        by_votes: a pair counts as often as it was judged.
    """
    gap = _gap(reward_chosen, reward_rejected)
    lead = torch.as_tensor(tie).to(gap)
    chosen, rejected = F.logsigmoid(gap - lead), F.logsigmoid(-gap - lead)
    return _per_vote((votes_chosen, votes_rejected, votes_tie), chosen, rejected,
                     _log_expm1(2 * lead) + chosen + rejected, by_votes=by_votes)  # fmt: skip


def davidson(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    votes_chosen: Tensor,
    votes_rejected: Tensor,
    votes_tie: Tensor,
    *,
    tie: float | Tensor = 0.5,
    by_votes: bool = False,
) -> Tensor:
    """-(a log P_w + b log P_l + t log P_t), divided by n unless ``by_votes``, [B].

    P_w, P_l, P_t are proportional to e^(z/2), e^(-z/2) and v: three classes, the third is "neither". At v = 0 there are
    no ties and P_w is Bradley and Terry's.

    Args:
        reward_chosen: [B].
        reward_rejected: [B].
        votes_chosen: [B].
        votes_rejected: [B].
        votes_tie: [B].
        tie: v, at least 0, above 0 if there are ties; v / (2 + v) is the share of ties between equal responses.
        by_votes: a pair counts as often as it was judged.
    """
    gap = _gap(reward_chosen, reward_rejected)
    neither = torch.as_tensor(tie).to(gap).log().expand_as(gap)
    chosen, rejected, tied = torch.stack([gap / 2, -gap / 2, neither]).log_softmax(dim=0)
    return _per_vote((votes_chosen, votes_rejected, votes_tie), chosen, rejected, tied, by_votes=by_votes)


def _gap(chosen: Tensor, rejected: Tensor) -> Tensor:
    return at_least_float32(chosen) - at_least_float32(rejected)


def _log_expm1(value: Tensor) -> Tensor:
    """log(e^x - 1), finite for large x; -inf at 0."""
    return value + torch.log(-torch.expm1(-value))


def _per_vote(votes: tuple[Tensor, ...], *logps: Tensor, by_votes: bool) -> Tensor:
    """Minus the sum of votes times their log-probabilities; an outcome without votes adds nothing, whatever its own."""
    counts = [one.to(logps[0]) for one in votes]
    terms = [
        torch.where(count > 0, count * torch.where(count > 0, logp, torch.zeros_like(logp)), torch.zeros_like(logp))
        for count, logp in zip(counts, logps, strict=True)
    ]
    loss = -torch.stack(terms).sum(dim=0)
    return loss if by_votes else loss / torch.stack(counts).sum(dim=0)
