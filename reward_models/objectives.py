"""Objectives of a reward model: pure functions of the two rewards, one value per pair. The mean is taken elsewhere.

Shapes: B pairs; rewards are [B], z = r_w - r_l is the margin. Float32 (float64 for float64 input), finite with finite
gradients for |z| up to 1e4. A configuration selects one by name: reward_models/registry.py.

    objective       trusts                                                                  source
    bradley_terry   every label equally                                                     Bradley and Terry (1952)
    comp_sum        tau > 1: labels that the model agrees with more; tau < 1: the others    arXiv 2304.07288, s-forms
    margin_mse      a teacher's margins, no label                                           arXiv 2010.02666
    auc             labels, and that any chosen beats any rejected response                 arXiv 2510.00137, eq. 3
    ldr_kl          labels, up to a margin, with a bounded gradient                         arXiv 2112.14869
    thumbs          labels of pairs, and of single responses, desirable or not              logistic regression
    aggregated      only the share of votes in each group of pairs                          arXiv 2401.11081
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.numerics import at_least_float32

STEEPEST = 30.0
"""comp_sum with tau < 1 grows exponentially; beyond e^30 its tangent replaces it, which floats can represent."""


def bradley_terry(
    reward_chosen: Tensor, reward_rejected: Tensor, margin: Tensor | None = None, *, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2, [B].

    The logistic loss of Bradley and Terry (1952), with the margin of Llama 2 (arXiv 2307.09288, eq. 2) and the
    centering of arXiv 2312.09244. trl's RewardTrainer computes its mean.
    """
    gap = reward_chosen - reward_rejected
    loss = -F.logsigmoid(gap if margin is None else gap - margin)
    return loss + centering * (reward_chosen + reward_rejected) ** 2


def thumbs(reward_chosen: Tensor, reward_rejected: Tensor, thumb: Tensor) -> Tensor:
    """-log sigmoid(r) of a desirable response, -log sigmoid(-r) of an undesirable one, of a pair Bradley-Terry's, [B].

    Args:
        reward_chosen: [B]; r of a single response.
        reward_rejected: [B]; not read for a single response.
        thumb: [B], 1 desirable, 0 undesirable, NaN a pair.
    """
    return -F.logsigmoid(thumb_gap(reward_chosen, reward_rejected, thumb))


def thumb_gap(reward_chosen: Tensor, reward_rejected: Tensor, thumb: Tensor) -> Tensor:
    """What should be above 0 [B]: r_w - r_l of a pair, r of a desirable response, -r of an undesirable one."""
    chosen = at_least_float32(reward_chosen)
    single = torch.where(thumb > 0.5, chosen, -chosen)
    return torch.where(thumb.isnan(), chosen - at_least_float32(reward_rejected), single)


def comp_sum(reward_chosen: Tensor, reward_rejected: Tensor, *, tau: float = 1.0) -> Tensor:
    """((1 + e^-z)^(1 - tau) - 1) / (1 - tau), [B]; its slope is -sigmoid(z)^(tau - 1) (1 - sigmoid(z)).

    tau 0 is the exponential loss, 1 Bradley-Terry, tau in (1, 2) generalized cross-entropy with q = tau - 1, 2 the mean
    absolute error 1 - sigmoid(z). The larger tau is above 1, the smaller is the gradient of a pair that the model ranks
    against its label. At tau = 2, the gradient of misranked pairs nearly vanishes, so little may be learned.
    """
    cost = -F.logsigmoid(at_least_float32(reward_chosen) - at_least_float32(reward_rejected))
    if tau == 1:
        return cost
    if tau > 1:
        return -torch.expm1((1 - tau) * cost) / (tau - 1)
    bound = STEEPEST / (1 - tau)
    inside = torch.expm1((1 - tau) * cost.clamp_max(bound)) / (1 - tau)
    return inside + math.exp(STEEPEST) * (cost - bound).clamp_min(0)


def margin_mse(reward_chosen: Tensor, reward_rejected: Tensor, teacher_margin: Tensor, *, scale: float = 1.0) -> Tensor:
    """(z - scale * teacher_margin)^2, [B]: regression on margins, independent of either model's offset per prompt."""
    return (
        at_least_float32(reward_chosen)
        - at_least_float32(reward_rejected)
        - scale * at_least_float32(teacher_margin).detach()
    ) ** 2


def auc(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    group: Tensor | None = None,
    *,
    temperature: float = 1.0,
    share: float = 1.0,
) -> Tensor:
    """(1 - share) Bradley-Terry + share * mean_j -log sigmoid((r_w,i - r_l,j) / temperature), [B].

    The second term, over all rejected responses j of the batch, bounds 1 - AUC of the batch from above: its mean over i
    is at least (1 - AUC) log 2; with ``group`` the AUC is the mean of those within the groups. It assumes that a chosen
    response is better than another prompt's rejected one, which pairs do not state; ``group`` keeps the comparisons
    within a category, a small ``share`` keeps most of the weight on the pairs.

    Args:
        reward_chosen: [B].
        reward_rejected: [B].
        group: [B], only pairs with the same number are compared; None: all with all.
        temperature: above 0.
        share: in [0, 1].
    """
    chosen, rejected = at_least_float32(reward_chosen), at_least_float32(reward_rejected)
    costs = -F.logsigmoid((chosen[:, None] - rejected[None, :]) / temperature)
    if group is None:
        across = costs.mean(dim=1)
    else:
        same = (group[:, None] == group[None, :]).to(costs.dtype)
        across = (costs * same).sum(dim=1) / same.sum(dim=1)
    return (1 - share) * -F.logsigmoid(chosen - rejected) + share * across


def ldr_kl(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    *,
    lam: float = 1.0,
    margin: float = 0.1,
    adaptive: bool = False,
    alpha: float = 2.0,
) -> Tensor:
    """lam (softplus((margin - z) / lam) - log 2), [B]: the label-distributionally robust loss of two classes.

    lam = 1, margin = 0 is Bradley-Terry less log 2; lam to 0 is the hinge of margin - z, lam to infinity the line
    (margin - z) / 2. With ``adaptive`` each pair has lam_i = lam (1 - KL(p_i, even) / (alpha log 2)), p_i the two
    probabilities at lam: the more certain the model, the smaller; in [lam (1 - 1/alpha), lam], without gradient. (The
    paper's further term in lam_i has no gradient in the rewards and is omitted; the rewards are not normalized.)

    Args:
        reward_chosen: [B].
        reward_rejected: [B].
        lam: softness, above 0.
        margin: c, the margin that a pair should have.
        adaptive: one softness per pair.
        alpha: above 1.
    """
    gap = at_least_float32(reward_chosen) - at_least_float32(reward_rejected)
    softness = torch.full_like(gap, lam)
    if adaptive:
        p = torch.sigmoid(gap.detach() / lam)
        divergence = math.log(2) + torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)
        softness = lam * (1 - divergence.clamp(0, math.log(2)) / (alpha * math.log(2)))
    return softness * (-F.logsigmoid((gap - margin) / softness) - math.log(2))


def aggregated(
    reward_chosen: Tensor, reward_rejected: Tensor, bag: Tensor, vote_share: Tensor, *, rho: float = 0.5
) -> Tensor:
    """(share - mean of p in the bag)^2 + rho (p - mean of p in the bag)^2, [B], with p = sigmoid(z).

    For labels that are known only as the share of a bag of pairs in which the first response won. rho = 0 fits the mean
    of each bag, rho = 1 every pair of it: the mean over a bag of the latter is exactly mean (share - p)^2. In between,
    rho trades the bias of the second for the variance of the first. The means are over those pairs of a bag that are in
    the batch, so a bag that is split over batches acts like a larger rho.

    Args:
        reward_chosen: [B], reward of the response whose wins the share counts.
        reward_rejected: [B].
        bag: [B], number of the bag of each pair.
        vote_share: [B], in [0, 1], the same for all pairs of a bag.
        rho: in [0, 1].
    """
    p = torch.sigmoid(at_least_float32(reward_chosen) - at_least_float32(reward_rejected))
    _, index = torch.unique(bag, return_inverse=True)
    size = torch.zeros(int(index.max()) + 1, dtype=p.dtype, device=p.device).index_add(0, index, torch.ones_like(p))
    mean = (torch.zeros_like(size).index_add(0, index, p) / size)[index]
    return (at_least_float32(vote_share) - mean) ** 2 + rho * (p - mean) ** 2
