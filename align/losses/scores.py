"""Losses of both log-ratios to the reference, c_w = logp_w - ref_w and c_l = logp_l - ref_l, or of h = c_w - c_l.

Shapes and precision as in align/losses/pairwise.py: B pairs, every tensor is [B], finite for h in [-1e6, 1e6].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.pairwise import PairLogps

LARGEST_LOG = 80.0
"""Exponents are cut here: e^80 is finite in float32. trl cuts those of the alpha divergence at the same place."""


def ln_dpo(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta (c_w / |y_w| - c_l / |y_l|)) (length-normalized DPO, Tulu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(beta * logps.mean_ratio_gap)


def hinge(logps: PairLogps, *, beta: float) -> Tensor:
    """max(0, 1 - beta h) (SLiC, arXiv 2305.10425, on DPO's implicit margin as in arXiv 2309.06657)."""
    return F.relu(1 - beta * logps.log_ratio_gap)


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(Bernoulli(sigmoid(beta h)) || Bernoulli(1 - e)), e = ``label_smoothing`` (EXO, arXiv 2402.00856, eq. 16)."""
    z = beta * logps.log_ratio_gap
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return right + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


def nca_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """-log s(beta c_w) - log s(-beta c_w) / 2 - log s(-beta c_l) / 2, s the sigmoid (NCA, arXiv 2402.05369)."""
    chosen, rejected = beta * logps.chosen_ratio, beta * logps.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta c_w) - log sigmoid(-beta c_l): BCO without its shift, as in trl 1.16 (arXiv 2404.04656)."""
    return -F.logsigmoid(beta * logps.chosen_ratio) - F.logsigmoid(-beta * logps.rejected_ratio)


def sppo_hard(logps: PairLogps, *, beta: float) -> Tensor:
    """(c_w - 1 / (2 beta))^2 + (c_l + 1 / (2 beta))^2 (SPPO with labels 1 and 0, arXiv 2405.00675, eq. 4.7)."""
    target = 0.5 / beta
    return (logps.chosen_ratio - target) ** 2 + (logps.rejected_ratio + target) ** 2


def apo_zero(logps: PairLogps, *, beta: float) -> Tensor:
    """1 - sigmoid(beta c_w) + sigmoid(beta c_l) (APO-zero, arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-beta * logps.chosen_ratio) + torch.sigmoid(beta * logps.rejected_ratio)


def apo_down(logps: PairLogps, *, beta: float) -> Tensor:
    """sigmoid(beta c_w) + 1 - sigmoid(beta h) (APO-down, arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(beta * logps.chosen_ratio) + torch.sigmoid(-beta * logps.log_ratio_gap)


def discopop(logps: PairLogps, *, beta: float, discopop_tau: float) -> Tensor:
    """-log s(z) (1 - m) + e^-z m with z = beta h, m = s(z / tau), s the sigmoid (DiscoPOP, arXiv 2406.08414, eq. 5).

    e^-z m is computed as one exponential, so that it does not overflow for tau <= 1.
    """
    z = beta * logps.log_ratio_gap
    logistic = -F.logsigmoid(z) * torch.sigmoid(-z / discopop_tau)
    return logistic + torch.exp(F.logsigmoid(z / discopop_tau) - z)


def focalpo(logps: PairLogps, *, beta: float, gamma: float) -> Tensor:
    """-p^gamma log p with p = sigmoid(beta h): less weight for pairs that are ranked wrongly (arXiv 2501.06645)."""
    log_p = F.logsigmoid(beta * logps.log_ratio_gap)
    return -torch.exp(gamma * log_p) * log_p


def fdpo_forward_kl(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta (e^-c_l - e^-c_w)): DPO under the forward KL (f-DPO, arXiv 2309.16240)."""
    chosen, rejected = (_exp(-c) for c in (logps.chosen_ratio, logps.rejected_ratio))
    return -F.logsigmoid(beta * (rejected - chosen))


def fdpo_js(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta (log s(c_w) - log s(c_l))): DPO under the Jensen-Shannon divergence (arXiv 2309.16240)."""
    return -F.logsigmoid(beta * (F.logsigmoid(logps.chosen_ratio) - F.logsigmoid(logps.rejected_ratio)))


def fdpo_alpha(logps: PairLogps, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta (f(c_w) - f(c_l))), f(c) = (e^((alpha - 1) c) - 1) / (alpha - 1) (arXiv 2309.16240).

    alpha as trl has it; alpha = 0 is the forward KL, and alpha -> 1 is DPO.
    """
    power = alpha - 1
    chosen, rejected = (_exp(power * c) for c in (logps.chosen_ratio, logps.rejected_ratio))
    return -F.logsigmoid(beta / power * (chosen - rejected))


def _exp(values: Tensor) -> Tensor:
    return torch.exp(values.clamp_max(LARGEST_LOG))
