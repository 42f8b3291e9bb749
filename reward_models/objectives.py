"""Losses of a reward model: pure functions of the two rewards, one value per pair."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    reward_chosen: Tensor, reward_rejected: Tensor, margin: Tensor | None = None, *, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2, [B].

    The logistic loss of Bradley and Terry (1952); the margin is that of Llama 2 (arXiv 2307.09288, eq. 2), the
    centring that of arXiv 2312.09244. trl's RewardTrainer computes the mean of the same.
    """
    gap = reward_chosen - reward_rejected
    loss = -F.logsigmoid(gap if margin is None else gap - margin)
    return loss + centering * (reward_chosen + reward_rejected) ** 2
