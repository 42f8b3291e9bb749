"""beta-DPO (arXiv 2407.08639) in the form of its official code: one beta per batch, outlying pairs left out.

``beta_dpo_step`` and ``beta_dpo`` are pure functions; ``BetaDpo`` in step_statistics.py keeps the state of a training.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.pairwise import PairLogps

BETA_FLOOR = 1e-3
SPREAD_FLOOR = 1e-3
"""Nats; gaps closer than this differ by rounding alone (all do before the first step) and are drawn equally often."""
SEED_STRIDE = 7919
"""Difference between the seeds of consecutive steps; runs whose seeds differ by less share no draw."""


@dataclass(frozen=True, slots=True)
class BetaDpoState:
    """Running mean and standard deviation of h over batches; both start at 0."""

    mean: float = 0.0
    std: float = 0.0


def beta_dpo_step(
    gaps: Tensor,
    state: BetaDpoState,
    *,
    beta: float,
    alpha: float,
    rho: float,
    momentum: float,
    generator: torch.Generator,
) -> tuple[float, Tensor, BetaDpoState]:
    """Compute the beta of this batch, the pairs that are kept, and the statistics after it.

    The statistics are updated before they are used. int(N rho) pairs (at least one) are drawn without replacement with
    probability ~ exp(-((h - mean) / std)^2 / 2); beta (1 + alpha (mean of the kept h - mean)) is clamped at 1e-3.

    Args:
        gaps: h [N] of the pairs of all processes, detached, on the CPU.
        state: statistics before the batch.
        beta: beta0, which is adapted.
        alpha: strength of the adaptation.
        rho: share of the pairs that is kept.
        momentum: weight of the previous statistics.
        generator: random generator of the draw; in the same state on every process.

    Returns:
        (beta, keep mask bool [N], new state).
    """
    h = gaps.double()
    spread = float(h.std()) if h.numel() > 1 else 0.0
    mean = momentum * state.mean + (1 - momentum) * float(h.mean())
    std = momentum * state.std + (1 - momentum) * spread
    log_density = -0.5 * ((h - mean) / max(std, SPREAD_FLOOR)) ** 2
    probability = torch.softmax(log_density, dim=0).clamp_min(1e-12)
    kept = torch.multinomial(probability, max(1, int(h.numel() * rho)), replacement=False, generator=generator)
    keep = torch.zeros(h.numel(), dtype=torch.bool)
    keep[kept] = True
    adapted = beta * (1 + alpha * (float(h[keep].mean()) - mean))
    return max(adapted, BETA_FLOOR), keep, BetaDpoState(mean, std)


def beta_dpo(logps: PairLogps, *, beta: float | Tensor, keep: Tensor, scale: float | Tensor) -> Tensor:
    """DPO's loss [B] at the batch's beta, 0 for pairs that are not kept, times ``scale``.

    With scale = N / kept, over all processes, the plain mean of the result is the mean over the kept pairs.
    """
    return -F.logsigmoid(beta * logps.log_ratio_gap) * keep * scale
