"""Losses that compare the pairs of an optimizer step; align/losses/step_statistics.py computes what they compare.

``statistics`` [B, K] is float64, without gradient, a row per pair. Shapes and precision as in pairwise.py.
"""

import torch.nn.functional as F
from torch import Tensor

from align.losses.beta_dpo import beta_dpo
from align.losses.pairwise import PairLogps, smoothed


def beta_dpo_of_step(
    logps: PairLogps, statistics: Tensor, *, beta: float, alpha: float, rho: float, momentum: float
) -> Tensor:
    """Compute DPO at the step's beta for the pairs that are kept, times N / kept; see ``beta_dpo_step``.

    Args:
        logps: log-probs of B pairs.
        statistics: the step's beta, and N / kept or 0, see ``BetaDpo``.
        beta: read by the statistics, as alpha, rho and momentum.
        alpha: see ``beta_dpo_step``.
        rho: see ``beta_dpo_step``.
        momentum: see ``beta_dpo_step``.
    """
    adapted, scale = _as(logps, statistics)
    return beta_dpo(logps, beta=adapted, keep=scale > 0, scale=scale)


def aot(logps: PairLogps, statistics: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta (q - q_ref)): the log-ratios q of chosen to rejected, sorted, against the reference's, sorted.

    First-order stochastic dominance by optimal transport (AOT, paired, arXiv 2406.05882); smoothed labels as in trl.
    """
    (target,) = _as(logps, statistics)
    q = logps.log_ratio_gap + logps.reference_gap
    return smoothed(beta * (q - target), label_smoothing)


def aot_unpaired(logps: PairLogps, statistics: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta (c_w - c_l)) of the sorted c_w and the sorted c_l, whichever pairs they belong to.

    The term of one rank has a chosen response of one pair and a rejected one of another; each of both pairs has half of
    its value and the gradient of its own response (AOT, unpaired, arXiv 2406.05882).
    """
    rejected, chosen = _as(logps, statistics)
    own_chosen = smoothed(beta * (logps.chosen_ratio - rejected), label_smoothing)
    own_rejected = smoothed(beta * (chosen - logps.rejected_ratio), label_smoothing)
    both = own_chosen + own_rejected
    return both - 0.5 * both.detach()


def amapo(logps: PairLogps, statistics: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta x - offset), x = x_w - x_l: a margin for pairs below the mean (AMaPO, arXiv 2511.09385)."""
    (offset,) = _as(logps, statistics)
    return -F.logsigmoid(beta * (logps.chosen_mean - logps.rejected_mean) - offset)


def alpha_dpo(
    logps: PairLogps,
    statistics: Tensor,
    *,
    beta: float,
    alpha: float,
    gamma_beta_ratio: float,
    length_normalize: bool,
) -> Tensor:
    """-log sigmoid(beta (x - [alpha z + gamma])), z the standardized h, x = x_w - x_l (alpha-DPO, arXiv 2410.10148).

    Without ``length_normalize`` both x and h are of sums of log-probs.
    """
    (z,) = _as(logps, statistics)
    gap = logps.chosen_mean - logps.rejected_mean if length_normalize else logps.log_ratio_gap + logps.reference_gap
    return -F.logsigmoid(beta * (gap - alpha * z - gamma_beta_ratio))


def bco(logps: PairLogps, statistics: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta c_w - d) - log sigmoid(d - beta c_l), d the mean reward so far (BCO, arXiv 2404.04656)."""
    (delta,) = _as(logps, statistics)
    return -F.logsigmoid(beta * logps.chosen_ratio - delta) - F.logsigmoid(delta - beta * logps.rejected_ratio)


def gamma_po(logps: PairLogps, statistics: Tensor, *, beta: float, gamma_beta_ratio: float, tau: float) -> Tensor:
    """-log sigmoid(beta x - g_i), x = x_w - x_l: SimPO with a target for each pair (gamma-PO, arXiv 2506.03690).

    Args:
        logps: log-probs of B pairs.
        statistics: g, see ``gamma_targets``.
        beta: scale of x.
        gamma_beta_ratio: mean target divided by beta; read by the statistics, as tau.
        tau: see ``gamma_targets``.
    """
    (target,) = _as(logps, statistics)
    return -F.logsigmoid(beta * (logps.chosen_mean - logps.rejected_mean) - target)


def gamma_dpo(logps: PairLogps, statistics: Tensor, *, beta: float, gamma_beta_ratio: float, tau: float) -> Tensor:
    """-log sigmoid(beta h - (g_i - g0)): gamma-PO on DPO's implicit margin, with g0 the mean target (its code)."""
    (target,) = _as(logps, statistics)
    return -F.logsigmoid(beta * logps.log_ratio_gap - (target - gamma_beta_ratio * beta))


def _as(logps: PairLogps, statistics: Tensor) -> list[Tensor]:
    """Columns of ``statistics`` in the precision and on the device of the log-ratios."""
    return list(statistics.detach().to(logps.log_ratio_gap).T)
