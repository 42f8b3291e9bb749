"""Reward margin -> weight of a pair. Pure functions; B is the number of pairs, m the margin [B] (reward units).

MADPO: arXiv 2510.05342; its reference code is sirano1004/Margin-Apative-Direct-Preference-Optimization.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.errors import ConfigError, listed

MADPO_TAU = math.log(0.999 / 0.001)


def validate_madpo(*, c_max: float, c_min: float, lam: float, tau: float) -> list[str]:
    """Check MADPO's parameters; warn where a larger margin would be given a smaller target.

    The target margin c(m) m rises with m near tau only if tau lam <= (c_max - c_min) / ((c_max - 1) (1 - c_min)).

    Returns:
        Warnings with their numbers; empty where there are none.

    Raises:
        ConfigError: unless c_max > 1, 0 <= c_min < 1, lam > 0, tau > 0, all finite; every problem at once.
    """
    rules = (
        ("c_max", c_max, c_max > 1, "a number above 1"),
        ("c_min", c_min, 0 <= c_min < 1, "a number in [0, 1)"),
        ("lam", lam, lam > 0, "a number above 0"),
        ("tau", tau, tau > 0, "a number above 0"),
    )
    problems = [
        f"{name}: found {value}, expected {expected}"
        for name, value, holds, expected in rules
        if not (holds and math.isfinite(value))
    ]
    if problems:
        raise ConfigError(f"parameters of madpo:\n{listed(problems)}", code="madpo-parameters")
    limit = (c_max - c_min) / ((c_max - 1) * (1 - c_min))
    if tau * lam > limit:
        return [
            f"madpo: tau * lam = {tau * lam:.3g} is above {limit:.3g}, so the target margin c(m) m falls near tau: "
            "a pair with a larger reward margin is given a smaller target there"
        ]
    return []


def madpo_coefficient(
    margin: Tensor, *, c_max: float = 2.0, c_min: float = 0.5, lam: float = 1.0, tau: float = MADPO_TAU
) -> Tensor:
    """MADPO's coefficient c(|m|) [B]: falls from below c_max to c_min, is 1 at |m| = tau.

    c(|m|) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(lam (|m| - tau)))
    """
    shift = math.log((c_max - 1) / (1 - c_min))
    return c_min + (c_max - c_min) * torch.sigmoid(-(lam * (_exact(margin).abs() - tau) + shift))


def madpo_weight(
    margin: Tensor, *, c_max: float = 2.0, c_min: float = 0.5, lam: float = 1.0, tau: float = MADPO_TAU
) -> Tensor:
    """MADPO's weight w(m) [B]: sigmoid(c m) / sigmoid(m) for m > -tau, else 1; 0 < w < 2.

    Computed as exp(logsigmoid(c m) - logsigmoid(m)) on a margin clamped at -tau, so nothing underflows and no gradient
    meets an infinity. float32 (float64 for float64 input) whatever the input.
    """
    exact = _exact(margin)
    inside = exact > -tau
    m = torch.where(inside, exact, torch.zeros_like(exact))
    c = madpo_coefficient(m, c_max=c_max, c_min=c_min, lam=lam, tau=tau)
    return torch.where(inside, torch.exp(F.logsigmoid(c * m) - F.logsigmoid(m)), torch.ones_like(m))


def effective_sample_size(weight: Tensor) -> Tensor:
    """Kish's effective sample size (sum w)^2 / sum w^2 of weights [B], a scalar in [1, B]; 0 where all are 0."""
    exact = _exact(weight)
    squares = exact.square().sum()
    return torch.where(squares > 0, exact.sum().square() / squares.clamp_min(1e-30), torch.zeros_like(squares))


def margin_regions(margin: Tensor, tau: float) -> dict[str, float]:
    """Shares of the pairs in the four regions that MADPO's weight treats differently; they sum to 1."""
    masks = {
        "m <= -tau": margin <= -tau,
        "-tau < m < 0": (margin > -tau) & (margin < 0),
        "0 <= m < tau": (margin >= 0) & (margin < tau),
        "m >= tau": margin >= tau,
    }
    return {name: float(mask.float().mean()) for name, mask in masks.items()}


def weight_summary(weight: Tensor, margin: Tensor, tau: float) -> dict[str, float | dict[str, float]]:
    """What a set of weights [B] does to the data: spread, effective sample size, regions, label disagreement."""
    ess = float(effective_sample_size(weight))
    return {
        "mean": float(weight.mean()),
        "min": float(weight.min()),
        "max": float(weight.max()),
        "ess": ess,
        "ess_share": ess / weight.numel(),
        "disagreement": float((margin < 0).float().mean()),
        "regions": margin_regions(margin, tau),
    }


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
