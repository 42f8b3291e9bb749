"""beta-DPO (arXiv 2407.08639) in the form of its official code: one beta per batch, outlying pairs left out.

It is the one loss with a state: running statistics of the log-ratio gap. ``beta_dpo_step`` and ``beta_dpo`` are pure
functions; ``BetaDpo`` keeps the state of a training.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from align.losses.pairwise import PairLogps, dpo

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


def beta_dpo(logps: PairLogps, *, beta: float, keep: Tensor, scale: float) -> Tensor:
    """DPO's loss [B] at the batch's beta, 0 for pairs that are not kept, times ``scale``.

    With scale = N / kept, over all processes, the plain mean of the result is the mean over the kept pairs.
    """
    return dpo(logps, beta=beta) * keep * scale


class BetaDpo:
    """beta-DPO during a training: its statistics run over the pairs of all processes and go into checkpoints.

    Args:
        parameters: beta, alpha, rho and momentum.
        gather: concatenates a tensor over the processes along its first dimension (all_gather).
        rank: index of this process.
        seed: seed of the draws, the same on every process.
    """

    def __init__(
        self, parameters: Mapping[str, Any], *, gather: Callable[[Tensor], Tensor], rank: int, seed: int
    ) -> None:
        self.parameters = parameters
        self.state = BetaDpoState()
        self.factor = torch.ones(())
        """Factor of the loss of each pair in the last batch, [B]: N / kept, or 0 where it is left out."""
        self._gather = gather
        self._rank = rank
        self._seed = seed

    def __call__(
        self, logps: PairLogps, *, step: int, real: Tensor | None = None, update: bool = True
    ) -> tuple[Tensor, float]:
        """Compute the loss [B] of this process's pairs and the beta of the batch.

        Args:
            logps: log-probs of B pairs; every process has as many.
            step: finished optimizer steps; seeds the draw together with ``seed``.
            real: bool [B], False for duplicates that only fill the batch; None: all pairs count.
            update: keep the new statistics; False outside the training.
        """
        mask = torch.ones_like(logps.chosen, dtype=torch.bool) if real is None else real
        all_real = self._gather(mask)
        gaps = self._gather(logps.log_ratio_gap.detach())[all_real]
        generator = torch.Generator().manual_seed(self._seed + SEED_STRIDE * (step + 1))
        beta, keep, state = beta_dpo_step(gaps.cpu(), self.state, **self.parameters, generator=generator)
        if update:
            self.state = state
        kept = torch.zeros_like(all_real)
        kept[all_real] = keep.to(gaps.device)
        local = kept.view(-1, len(mask))[self._rank]
        scale = keep.numel() / int(keep.sum())
        self.factor = local * scale
        return beta_dpo(logps, beta=beta, keep=local, scale=scale), beta

    def state_dict(self) -> dict[str, float]:
        """Return the state as plain numbers, for a checkpoint."""
        return asdict(self.state)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restore the state from ``state_dict``'s numbers; other keys of ``values`` are ignored."""
        self.state = BetaDpoState(mean=float(values["mean"]), std=float(values["std"]))
