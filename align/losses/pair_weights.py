"""Weights of pairs in addition to the loss's own. Pure functions; B pairs, every tensor is [B], no gradient.

There are two kinds. Weights from the losses of a batch are multiplied into the loss; they have mean 1. Shrinkage pulls
an unreliable reward margin towards 0, so that a weight computed from it becomes that of an unknown margin.
docs/concepts.md says which of them addresses which failure: the literature does not agree on the sign.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from align.config import TiltSection
from align.losses.margin_weights import effective_sample_size
from align.losses.numerics import at_least_float32

Shape = Literal["lin_upper", "quadratic", "extremes"]
QUANTILES = (0.05, 0.95)
LARGEST_LOG = 30.0
"""A weight is at most e^30."""


def tilt(losses: Tensor, *, sign: int, temperature: float) -> Tensor:
    """B softmax(sign * loss / temperature): weights of the worst (+1) or the best (-1) case over the pairs.

    They are the derivatives of sign * t * log mean exp(sign * loss / t). +1 is KLDPO's sign (arXiv 2502.01930), for
    preferences that shift; -1 is Dr. DPO's (arXiv 2407.07880), for wrong labels. As the temperature rises to infinity,
    every weight becomes 1.
    """
    exact = at_least_float32(losses.detach())
    return exact.numel() * torch.softmax(sign * exact / temperature, dim=0)


def shaped(losses: Tensor, *, shape: Shape, temperature: float, quantiles: tuple[float, float] = QUANTILES) -> Tensor:
    """Weights proportional to exp(f(h) / temperature) with h the losses scaled to [-1, 1] (arXiv 2502.06733).

    f is min(h + 1, 1) for lin_upper (less for easy pairs), 1 - h^2 for quadratic (more for the middle), |h| for
    extremes. No weight is more than e^(1 / temperature) times another. h is scaled between two quantiles of the batch
    and clipped; scaled by the smallest and largest loss, as in the paper's code, one outlier would set all weights.
    """
    exact = at_least_float32(losses.detach())
    low, high = torch.quantile(exact, torch.tensor(quantiles, dtype=exact.dtype, device=exact.device))
    h = (2 * (exact - low) / (high - low).clamp_min(1e-6) - 1).clamp(-1, 1)
    functions: dict[Shape, Callable[[], Tensor]] = {
        "lin_upper": lambda: (h + 1).clamp_max(1),
        "quadratic": lambda: 1 - h.square(),
        "extremes": h.abs,
    }
    return exact.numel() * torch.softmax(functions[shape]() / temperature, dim=0)


def comp_sum_weight(gap: Tensor, *, tau: float) -> Tensor:
    """sigmoid(z)^(tau - 1): the factor on the gradient of -log sigmoid(z) in the comp-sum loss (arXiv 2304.07288).

    Before normalization it is the tilt of those losses with sign -1 and temperature 1 / (tau - 1).
    """
    return torch.exp(((tau - 1) * F.logsigmoid(at_least_float32(gap.detach()))).clamp_max(LARGEST_LOG))


def mean_one(weight: Tensor) -> Tensor:
    """Divide weights by their mean; all 1 if they are all 0."""
    mean = weight.mean()
    return torch.where(mean > 0, weight / mean.clamp_min(torch.finfo(weight.dtype).tiny), torch.ones_like(weight))


def shrink_by_distance(margin: Tensor, distance: Tensor, *, limit: float, softness: float) -> Tensor:
    """m exp(-max(d - limit, 0) / softness): shrinks the margin of pairs far from the reward model's training data.

    d is the Mahalanobis distance in the reward model's features (arXiv 1807.03888; align/filtering/ood.py).
    """
    return margin * torch.exp(-(distance - limit).clamp_min(0) / softness)


def moderate(margin: Tensor, margin_std: Tensor) -> Tensor:
    """m / sqrt(1 + pi s^2 / 8): the margin whose sigmoid is the mean sigmoid of margins with spread s around m.

    MacKay's approximation (1992) to E sigmoid(m + s e) with e standard normal: a small spread changes nothing, a large
    one divides the margin.
    """
    return margin / torch.sqrt(1 + math.pi / 8 * margin_std.square())


class LossTilt:
    """Computes weights of one step's pairs from their losses, over the pairs of all processes.

    Args:
        config: kind and parameters of the weights.
        gather: concatenates a tensor over processes along its first dimension (all_gather).
        rank: index of this process.
    """

    def __init__(self, config: TiltSection, gather: Callable[[Tensor], Tensor], rank: int) -> None:
        self.config = config
        self._gather = gather
        self._rank = rank

    def __call__(self, losses: Tensor, gap: Tensor, step: int, real: Tensor | None = None) -> tuple[Tensor, float]:
        """Return weights [B] of this process's pairs, without gradient, and the effective sample size / pairs.

        Args:
            losses: [B].
            gap: z of each pair, [B]; -log sigmoid(z) is its loss under DPO or Bradley-Terry.
            step: finished optimizer steps; during the first ``warmup`` steps all weights are 1.
            real: bool [B], False for duplicates that only fill the batch, which get the weight 0; None: all count.
        """
        columns = [at_least_float32(losses.detach()), at_least_float32(gap.detach())] + (
            [] if real is None else [at_least_float32(real.to(losses).detach())]
        )
        gathered = self._gather(torch.stack(columns, dim=1))
        mask = torch.ones_like(gathered[:, 0], dtype=torch.bool) if real is None else gathered[:, 2] > 0
        pairs = gathered[mask, :2]
        real_weights = torch.ones_like(pairs[:, 0]) if step < self.config.warmup else self._weights(*pairs.T)
        weights = torch.zeros_like(gathered[:, 0])
        weights[mask] = real_weights
        local, first = len(losses), len(losses) * self._rank
        return weights[first : first + local], float(effective_sample_size(real_weights)) / len(real_weights)

    def _weights(self, losses: Tensor, gap: Tensor) -> Tensor:
        kind, temperature = self.config.kind, self.config.temperature
        if kind == "comp_sum":
            return mean_one(comp_sum_weight(gap, tau=self.config.tau))
        if kind == "up":
            return tilt(losses, sign=1, temperature=temperature)
        if kind == "down":
            return tilt(losses, sign=-1, temperature=temperature)
        return shaped(losses, shape=kind, temperature=temperature)
