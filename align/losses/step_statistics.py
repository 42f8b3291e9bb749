"""Statistics over all pairs of an optimizer step and of all processes, for losses that compare pairs.

N pairs of a step in the order of their rows in the table, however they are split into micro-batches and over processes;
C numbers that a statistic reads of each pair, K numbers that each pair gets back. Nothing here carries a gradient.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from align.losses.beta_dpo import SEED_STRIDE, BetaDpoState, beta_dpo_step
from align.losses.pairwise import PairLogps

SPREAD_FLOOR = 1e-4
"""Smallest standard deviation that something is divided by, in nats; before the first step all pairs are equal."""
MOMENTUM = 0.9
"""Weight of the previous steps in alpha-DPO's running statistics, as in its code."""
LARGEST_LOG = 30.0
"""An offset of AMaPO is at most beta e^30."""
QUEUE = 256
"""Gaps among which gamma-PO divides its target."""
MIRROR_STEPS = 20


class StepStatistic(Protocol):
    """One statistic during a training; created with the parameters of its loss and the seed of the run."""

    def columns(self, logps: PairLogps) -> Tensor:
        """Return what the statistic reads of each pair, [B, C]."""

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """Compute the statistics of a step.

        Args:
            columns: [N, C], float64 on the CPU, the pairs of all processes.
            step: finished optimizer steps.
            update: keep what the next step needs; False outside of training.

        Returns:
            [N, K], and numbers to log.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint as plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""


class Stateless:
    """A statistic of the pairs of one step alone."""

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        self.parameters = parameters
        self.seed = seed

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""


class BetaDpo(Stateless):
    """beta-DPO: the beta of the step, and N / kept for the pairs that are kept, 0 for the others (K = 2)."""

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        super().__init__(parameters, seed)
        self.state = BetaDpoState()

    def columns(self, logps: PairLogps) -> Tensor:
        """Return h [B, 1]."""
        return logps.log_ratio_gap[:, None]

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``; the draw depends on the seed, the step and the order of the pairs alone."""
        generator = torch.Generator().manual_seed(self.seed + SEED_STRIDE * (step + 1))
        beta, keep, state = beta_dpo_step(columns[:, 0], self.state, **self.parameters, generator=generator)
        if update:
            self.state = state
        scale = keep.double() * (len(keep) / int(keep.sum()))
        return torch.stack([torch.full_like(scale, beta), scale], dim=1), {"beta": beta}

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and standard deviation."""
        return {"mean": self.state.mean, "std": self.state.std}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.state = BetaDpoState(mean=float(state["mean"]), std=float(state["std"]))


class AotTarget(Stateless):
    """AOT: the reference's log-ratio of the same rank as the pair's own (K = 1)."""

    def columns(self, logps: PairLogps) -> Tensor:
        """Return the log-ratio of chosen to rejected under policy and reference [B, 2]."""
        policy, reference = logps.chosen_ratio - logps.rejected_ratio, logps.reference_gap
        return torch.stack([policy + reference, reference], dim=1)

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        policy, reference = columns.T
        return reference.sort().values[ranks(policy)][:, None], {}


class AotMatches(Stateless):
    """Unpaired AOT: the rejected log-ratio of the rank of the own chosen one, and the other way round (K = 2)."""

    def columns(self, logps: PairLogps) -> Tensor:
        """Return both log-ratios to the reference [B, 2]."""
        return torch.stack([logps.chosen_ratio, logps.rejected_ratio], dim=1)

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        chosen, rejected = columns.T
        matches = [rejected.sort().values[ranks(chosen)], chosen.sort().values[ranks(rejected)]]
        return torch.stack(matches, dim=1), {}


class AmapoOffset(Stateless):
    """AMaPO: the offset beta exp((mu - x) / sigma mu) of a pair whose x is below the mean mu, else 0 (K = 1)."""

    def columns(self, logps: PairLogps) -> Tensor:
        """Return x, the difference of the mean log-probs [B, 1]."""
        return (logps.chosen_mean - logps.rejected_mean)[:, None]

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        x, mean = columns[:, 0], columns.mean()
        spread = columns.std() if len(columns) > 1 else columns.new_zeros(())
        exponent = ((mean - x) / spread.clamp_min(SPREAD_FLOOR) * mean).clamp_max(LARGEST_LOG)
        offset = self.parameters["beta"] * torch.exp(exponent)
        return torch.where(x < mean, offset, torch.zeros_like(x))[:, None], {}


class AlphaDpoScore(Stateless):
    """alpha-DPO: h standardized by running statistics, which start at 0 and hold the step already (K = 1).

    It is 0 as long as the pairs do not differ, as before the first step.
    """

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        super().__init__(parameters, seed)
        self.mean = self.std = 0.0

    def columns(self, logps: PairLogps) -> Tensor:
        """Return h [B, 1], of mean log-probs with ``length_normalize``."""
        gap = logps.mean_ratio_gap if self.parameters["length_normalize"] else logps.log_ratio_gap
        return gap[:, None]

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        spread = float(columns.std()) if len(columns) > 1 else 0.0
        mean = MOMENTUM * self.mean + (1 - MOMENTUM) * float(columns.mean())
        std = MOMENTUM * self.std + (1 - MOMENTUM) * spread
        if update:
            self.mean, self.std = mean, std
        return (columns - mean) / std if std > SPREAD_FLOOR else torch.zeros_like(columns), {}

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and standard deviation."""
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.mean, self.std = float(state["mean"]), float(state["std"])


class BcoShift(Stateless):
    """BCO: the mean of the implicit rewards of all responses so far, this step's included (K = 1)."""

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        super().__init__(parameters, seed)
        self.mean, self.pairs = 0.0, 0

    def columns(self, logps: PairLogps) -> Tensor:
        """Return both implicit rewards [B, 2]."""
        return self.parameters["beta"] * torch.stack([logps.chosen_ratio, logps.rejected_ratio], dim=1)

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        pairs = self.pairs + len(columns)
        mean = self.mean + (float(columns.mean()) - self.mean) * len(columns) / pairs
        if update:
            self.mean, self.pairs = mean, pairs
        return torch.full_like(columns[:, :1], mean), {"delta": mean}

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the number of pairs that it is over."""
        return {"mean": self.mean, "pairs": self.pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.mean, self.pairs = float(state["mean"]), int(state["pairs"])


class KtoBaseline(Stateless):
    """KTO: mean log-ratio of the step's mismatched responses, at least 0 (K = 1).

    ``rejected`` holds, for each prompt, the response to another one: trl's estimate of KL(policy || reference).
    """

    def columns(self, logps: PairLogps) -> Tensor:
        """Return the log-ratio of the mismatched response [B, 1]."""
        return logps.rejected_ratio[:, None]

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        mean = max(float(columns.mean()), 0.0)
        return torch.full_like(columns, mean), {"kl": mean}


class ThumbShift(BcoShift):
    """BCO of single responses: the mean of their implicit rewards so far, this step's included (K = 1)."""

    def columns(self, logps: PairLogps) -> Tensor:
        """Return the implicit reward [B, 1]."""
        return self.parameters["beta"] * logps.chosen_ratio[:, None]


class GammaTarget(Stateless):
    """gamma-PO: the target margin of each pair, a share of the whole target that favors large gaps (K = 1).

    The authors draw the gaps of earlier steps at random from the last 2,048; here they are the latest, so that the same
    run has the same targets. Their queue starts with eight random numbers, this one empty.
    """

    def __init__(self, parameters: Mapping[str, Any], seed: int) -> None:
        super().__init__(parameters, seed)
        self.queue: list[float] = []

    def columns(self, logps: PairLogps) -> Tensor:
        """Return the gap, beta times the difference of the mean log-probs [B, 1]."""
        return self.parameters["beta"] * (logps.chosen_mean - logps.rejected_mean)[:, None]

    def __call__(self, columns: Tensor, step: int, *, update: bool) -> tuple[Tensor, dict[str, float]]:
        """See ``StepStatistic``."""
        own = columns[:, 0]
        room = max(QUEUE - len(own), 0)
        past = self.queue[-room:] if room else []
        whole = self.parameters["gamma_beta_ratio"] * self.parameters["beta"]
        gaps = torch.cat([own.new_tensor(past), own])
        targets = gamma_targets(gaps, whole=whole, tau=self.parameters["tau"])
        if update:
            self.queue = [*self.queue, *own.tolist()][-QUEUE:]
        return targets[len(past) :][:, None], {}

    def state_dict(self) -> dict[str, Any]:
        """Return the gaps of earlier steps."""
        return {"queue": list(self.queue)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.queue = [float(gap) for gap in state["queue"]]


class GammaDpoTarget(GammaTarget):
    """gamma-PO in its DPO form: the gap is beta h."""

    def columns(self, logps: PairLogps) -> Tensor:
        """Return beta h [B, 1]."""
        return self.parameters["beta"] * logps.log_ratio_gap[:, None]


def gamma_targets(gaps: Tensor, *, whole: float, tau: float) -> Tensor:
    """Targets g0 N p [N] after 20 steps of mirror descent of p on the simplex, from p = 1 / N (gamma-PO's code).

    The gradient is tau (1 + log(N p_i)) + g0 sigmoid(g0 N p_i - gap_i), the step size min(1 / (2 tau), 1).

    Args:
        gaps: [N].
        whole: g0, the target that every pair would have alone.
        tau: strength of the pull to equal targets.
    """
    count = len(gaps)
    rate, log_count = min(0.5 / tau, 1.0), math.log(count)
    log_share = torch.full_like(gaps, -log_count)
    for _ in range(MIRROR_STEPS):
        target = whole * torch.exp(log_share + log_count)
        gradient = tau * (1 + log_share + log_count) + whole * torch.sigmoid(target - gaps)
        log_share = torch.log_softmax(log_share - rate * gradient, dim=0)
    return whole * torch.exp(log_share + log_count)


def ranks(values: Tensor) -> Tensor:
    """Rank of each of N values, 0 for the smallest; equal values in their order."""
    order = torch.argsort(values, stable=True)
    return torch.empty_like(order).index_put_((order,), torch.arange(len(values), device=values.device))
