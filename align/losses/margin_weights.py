"""Weight and soft label of a pair from its reward margin. Pure functions; m is the margin [B] of B pairs.

MADPO: arXiv 2510.05342; its reference code is sirano1004/Margin-Apative-Direct-Preference-Optimization.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.errors import ConfigError, listed
from align.losses.numerics import at_least_float32

MADPO_TAU = math.log(0.999 / 0.001)
BISECTIONS = 60


def validate_madpo(*, c_max: float, c_min: float, lam: float, tau: float) -> list[str]:
    """Check MADPO's parameters; warn if a larger margin would get a smaller target.

    The target margin c(m) m rises with m near tau only if tau lam <= (c_max - c_min) / ((c_max - 1) (1 - c_min)).

    Returns:
        Warnings with their numbers; empty if there are none.

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
            "a pair with a larger reward margin gets a smaller target there"
        ]
    return []


def madpo_coefficient(
    margin: Tensor, *, c_max: float = 2.0, c_min: float = 0.5, lam: float = 1.0, tau: float = MADPO_TAU
) -> Tensor:
    """MADPO's coefficient c(|m|) [B]: falls from below c_max to c_min, is 1 at |m| = tau.

    c(|m|) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(lam (|m| - tau)))
    """
    shift = math.log((c_max - 1) / (1 - c_min))
    return c_min + (c_max - c_min) * torch.sigmoid(-(lam * (at_least_float32(margin).abs() - tau) + shift))


def madpo_weight(
    margin: Tensor, *, c_max: float = 2.0, c_min: float = 0.5, lam: float = 1.0, tau: float = MADPO_TAU
) -> Tensor:
    """MADPO's weight w(m) [B]: sigmoid(c m) / sigmoid(m) for m > -tau, else 1; 0 < w < 2.

    Computed as exp(logsigmoid(c m) - logsigmoid(m)) on margins above -tau, so nothing underflows and every gradient is
    finite. The result is float32 (float64 for float64 input).
    """
    exact = at_least_float32(margin)
    inside = exact > -tau
    m = torch.where(inside, exact, torch.zeros_like(exact))
    c = madpo_coefficient(m, c_max=c_max, c_min=c_min, lam=lam, tau=tau)
    return torch.where(inside, torch.exp(F.logsigmoid(c * m) - F.logsigmoid(m)), torch.ones_like(m))


def validate_trust(*, slope: float, trust: float, strength: float) -> None:
    """Check the parameters of ``trusted_label`` that MADPO does not have.

    Raises:
        ConfigError: unless slope >= 0, 0 <= trust <= 1, 0 <= strength <= 1, all finite; every problem at once.
    """
    rules = (
        ("slope", slope, slope >= 0, "a number of at least 0"),
        ("trust", trust, 0 <= trust <= 1, "a number in [0, 1]"),
        ("strength", strength, 0 <= strength <= 1, "a number in [0, 1]"),
    )
    problems = [
        f"{name}: found {value}, expected {expected}"
        for name, value, holds, expected in rules
        if not (holds and math.isfinite(value))
    ]
    if problems:
        raise ConfigError(f"parameters of trust:\n{listed(problems)}", code="loss-parameter")


def trusted_label(
    margin: Tensor,
    *,
    slope: float,
    trust: float | Tensor,
    strength: float,
    c_max: float = 2.0,
    c_min: float = 0.5,
    lam: float = 1.0,
    tau: float = MADPO_TAU,
) -> tuple[Tensor, Tensor]:
    """Soft label and weight of each pair when the margin is trusted with weight ``trust`` and the label with the rest.

    The loss (1 - t) w(g b m) CE(1) + t CE(p) with p = sigmoid(b m), CE(q) the cross-entropy of the policy's
    sigmoid(beta h) to the label q, is weight * CE(target) with weight = (1 - t) w + t and
    target = ((1 - t) w + t p) / weight. t = 0, g = 0 is DPO; t = 0, g = 1 is MADPO on b m; t = 1 is soft labels.

    Args:
        margin: m [B].
        slope: b >= 0, log-odds of the label per unit of margin.
        trust: t in [0, 1], one for all pairs or one per pair [B] (``trust_of_each``).
        strength: g in [0, 1], strength of MADPO's weight w on the label's term.
        c_max: parameter of MADPO's weight, as c_min, lam and tau.
        c_min: see ``madpo_weight``.
        lam: see ``madpo_weight``.
        tau: see ``madpo_weight``.

    Returns:
        target [B] in [0, 1] and weight [B] > 0, without gradient; float32 (float64 for float64 input).
    """
    m = slope * at_least_float32(margin.detach())
    t = torch.as_tensor(trust, dtype=m.dtype, device=m.device).expand_as(m)
    label = (1 - t) * madpo_weight(strength * m, c_max=c_max, c_min=c_min, lam=lam, tau=tau)
    weight = label + t
    smallest = torch.finfo(weight.dtype).tiny
    return (label + t * torch.sigmoid(m)) / weight.clamp_min(smallest), weight


def trust_of_each(margin_std: Tensor, trust: float) -> Tensor:
    """Trust t_i [B] that falls as the error of the margin rises, with mean ``trust``.

    t_i / (1 - t_i) = k / (v + s_i^2): the optimal mix of label and margin has odds inversely proportional to the error
    variance s_i^2 of the margin. v, the part of the error that the members of an ensemble share and its spread does not
    show, is assumed to be the mean of s^2; k sets the mean.

    Args:
        margin_std: s [B], standard deviation of each margin over an ensemble, in units of the margin.
        trust: mean of the result.
    """
    variance = at_least_float32(margin_std).detach().double().square()
    mean = variance.mean()
    fall = -torch.log1p(variance / mean) if mean > 0 else torch.zeros_like(variance)
    if trust in (0.0, 1.0):
        return torch.full_like(fall, trust).to(at_least_float32(margin_std).dtype)
    center = math.log(trust / (1 - trust))
    low, high = center - float(fall.max()), center - float(fall.min())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(torch.sigmoid(fall + middle).mean()) < trust:
            low = middle
        else:
            high = middle
    return torch.sigmoid(fall + (low + high) / 2).to(at_least_float32(margin_std).dtype)


def effective_sample_size(weight: Tensor) -> Tensor:
    """Kish's effective sample size (sum w)^2 / sum w^2 of weights [B], a scalar in [1, B]; 0 if all weights are 0."""
    exact = at_least_float32(weight)
    squares = exact.square().sum()
    return torch.where(squares > 0, exact.sum().square() / squares.clamp_min(1e-30), torch.zeros_like(squares))


def margin_regions(margin: Tensor, tau: float) -> dict[str, float]:
    """Share of the pairs in each of the four regions that MADPO's weight treats differently; they sum to 1."""
    masks = {
        "m <= -tau": margin <= -tau,
        "-tau < m < 0": (margin > -tau) & (margin < 0),
        "0 <= m < tau": (margin >= 0) & (margin < tau),
        "m >= tau": margin >= tau,
    }
    return {name: float(mask.float().mean()) for name, mask in masks.items()}


def weight_summary(weight: Tensor, margin: Tensor, tau: float) -> dict[str, float | dict[str, float]]:
    """Summarize weights [B]: mean, extremes, effective sample size, margin regions, label disagreement."""
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
