"""The loss of one forward pass of a reward model: weighted mean of an objective over the pairs of all processes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from align.losses.pair_weights import LossTilt
from reward_models.covariates import Coefficients
from reward_models.registry import BoundObjective
from reward_models.tie_parameter import TieParameter


class StepLoss:
    """Weighted mean of an objective over the real pairs of a batch, plus the centering of the rewards.

    The mean is over this process's pairs. A coupled objective compares the pairs of all processes, so each process
    computes the mean over all of them, with the gradient of its own rewards; the launcher averages over the processes.

    Args:
        objective: bound to its parameters.
        tilt: weights from the losses, or None.
        centering: coefficient of the mean of (r_w + r_l)^2; None: no such term.
        gather: concatenates a tensor over the processes along its first dimension (all_gather).
        rank: index of this process.
        processes: number of processes.
        ties: the tie parameter of the objective, if it learns one.
        covariates: coefficients of the covariates, for an objective of single pairs; None: there are none.
    """

    def __init__(
        self,
        objective: BoundObjective,
        *,
        tilt: LossTilt | None,
        centering: float | None,
        gather: Callable[[Tensor], Tensor],
        rank: int,
        processes: int,
        ties: TieParameter | None = None,
        covariates: Coefficients | None = None,
    ) -> None:
        self.objective = objective
        self.tilt = tilt
        self.centering = centering
        self.gather = gather
        self.rank = rank
        self.processes = processes
        self.ties = ties
        self.covariates = covariates

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        columns: Mapping[str, Tensor],
        real: Tensor | None = None,
        *,
        step: int | None = None,
        weights: Tensor | None = None,
        z: Tensor | None = None,
    ) -> tuple[Tensor, float | None]:
        """Compute the loss, a scalar, and the effective sample size of the tilt as a share of the pairs.

        Args:
            chosen: rewards [B] of this process's pairs.
            rejected: rewards [B].
            columns: what the objective reads, each [B].
            real: bool [B], False for duplicates that only fill the batch; None: all pairs count.
            step: finished optimizer steps, for the tilt; None: no tilt, outside the training.
            weights: factor of each pair's loss, [B]; None: 1. The mean is still over the number of pairs.
            z: covariates [B, C]; None: none, as outside the training.
        """
        shift = 0 if z is None or step is None else self._shift(z, step).to(chosen)
        chosen = chosen + shift
        local, mask = slice(None), real
        if self.objective.spec.coupled:
            local = slice(len(chosen) * self.rank, len(chosen) * (self.rank + 1))
            chosen, rejected = self._gather_rewards(chosen), self._gather_rewards(rejected)
            columns = {name: self.gather(values) for name, values in columns.items()}
            mask = None if real is None else self.gather(real)
        objective = self.objective if self.ties is None else self.ties.bound(step)
        if self.ties is not None and step is not None:
            self.ties.see(chosen, rejected, columns, mask)
        losses, share = _losses(objective, chosen, rejected, columns, mask), None
        if self.tilt is not None and step is not None:
            weight, share = self.tilt(losses[local], (chosen - rejected)[local], step, real)
            losses = (self.gather(weight) if self.objective.spec.coupled else weight) * losses
        if weights is not None:
            losses = (self.gather(weights) if self.objective.spec.coupled else weights) * losses
        if self.covariates is not None and z is not None and step is not None:
            (slopes,) = torch.autograd.grad(losses.sum(), chosen, retain_graph=True)
            self.covariates.see(slopes, z, real)
        loss = _mean(losses, mask)
        if self.centering is not None:
            loss = loss + self.centering * _mean((chosen + rejected - shift) ** 2, mask)
        # The launcher averages gradients over processes; each has only its own rewards' share of a coupled loss.
        others = self.processes - 1 if self.objective.spec.coupled else 0
        return loss + others * (loss - loss.detach()), share

    def _shift(self, z: Tensor, step: int) -> Tensor:
        """What the covariates add to the margins, [B]."""
        return z.new_zeros(len(z)) if self.covariates is None else self.covariates.shift(z, step)

    def _gather_rewards(self, local: Tensor) -> Tensor:
        """Concatenate rewards over the processes; those of this process keep their gradient."""
        gathered = self.gather(local.detach())
        first = len(local) * self.rank
        return torch.cat([gathered[:first], local, gathered[first + len(local) :]])


def _losses(
    objective: BoundObjective,
    chosen: Tensor,
    rejected: Tensor,
    columns: Mapping[str, Tensor],
    real: Tensor | None,
) -> Tensor:
    """Compute the objective [B] over the real pairs, 0 for the others."""
    if real is None:
        return objective(chosen, rejected, columns)
    losses = objective(chosen[real], rejected[real], {name: values[real] for name, values in columns.items()})
    return losses.new_zeros(len(real)).index_put((real.nonzero().flatten(),), losses)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of [B] over the real pairs, 0 if there are none."""
    return values.mean() if real is None else (values * real).sum() / real.sum().clamp_min(1)
