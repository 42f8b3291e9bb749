"""Losses without a reference: of the log-probs of the policy alone, x_w = logp_w / |y_w| and x_l = logp_l / |y_l|.

Shapes and precision as in align/losses/pairwise.py: B pairs, every tensor is [B]. Log-probs are at most 0; where a
formula has no value above, it is continued as a constant.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.numerics import at_least_float32
from align.losses.pairwise import PairLogps
from align.losses.scores import LARGEST_LOG

LARGEST_MEAN = -1e-6
"""Largest mean log-prob of which ORPO takes the odds."""


def nll(logps: PairLogps) -> Tensor:
    """-x_w: the negative log-likelihood of the chosen response per token, the loss of supervised fine-tuning."""
    return -logps.chosen_mean


def cpo(logps: PairLogps, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta (logp_w - logp_l)) - alpha x_w (CPO, arXiv 2401.08417, as in trl)."""
    gap = at_least_float32(logps.chosen) - at_least_float32(logps.rejected)
    return -F.logsigmoid(beta * gap) - alpha * logps.chosen_mean


def alphapo(logps: PairLogps, *, beta: float, alpha: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (r_w - r_l) - gamma), r = (1 - e^(-alpha x)) / alpha (AlphaPO, arXiv 2501.03884).

    alpha -> 0 is SimPO with the target gamma.
    """
    chosen, rejected = (
        -torch.expm1((-alpha * x).clamp_max(LARGEST_LOG)) / alpha for x in (logps.chosen_mean, logps.rejected_mean)
    )
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(logps: PairLogps, *, lam: float) -> Tensor:
    """-x_w - lam log sigmoid(log odds(x_w) - log odds(x_l)), odds(x) = e^x / (1 - e^x) (arXiv 2403.07691, eq. 4, 7)."""
    chosen, rejected = (x.clamp_max(LARGEST_MEAN) for x in (logps.chosen_mean, logps.rejected_mean))
    log_odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return -logps.chosen_mean - lam * F.logsigmoid(log_odds)


def simper(logps: PairLogps) -> Tensor:
    """e^x_l - e^x_w: the inverse perplexities, without any parameter (SimPER, arXiv 2502.00883)."""
    return torch.exp(logps.rejected_mean.clamp_max(0)) - torch.exp(logps.chosen_mean.clamp_max(0))


def repo(logps: PairLogps, *, gamma: float) -> Tensor:
    """max(0, gamma - (x_w - x_l)): SimPO's limit for beta -> infinity, a hinge (RePO, arXiv 2503.07426)."""
    return F.relu(gamma - (logps.chosen_mean - logps.rejected_mean))
