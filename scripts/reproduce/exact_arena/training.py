"""Train many small softmax policies at once with the losses of align/losses, all on the same batches of pairs.

Shapes: S seeds, M policies, B pairs per batch, R responses, D features; float64. Every policy takes the same number of
steps of the same optimizer: Adam with one second moment per policy rather than per parameter, so that neither the scale
of a loss nor the basis of the features matters. The length of a step then does not depend on the loss: beta times the
learning rate bounds how far a policy can go, and sweeping beta sweeps how hard it is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align.losses.beta_dpo import BetaDpoState, beta_dpo, beta_dpo_step
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.trust.slope import calibrated_slope
from scripts.reproduce.exact_arena.world import World

STEPS, BATCH = 100, 32
RATE = 0.15
"""Learning rate at the start; it falls to 0 as a cosine."""
FIRST, SECOND = 0.9, 0.95
"""Decays of the two moments."""
CALIBRATED = "trust"
"""The loss whose margins are multiplied by their calibrated slope on the labels, as `align trust` does."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is trained."""

    loss: BoundLoss
    labels: Literal["given", "redrawn", "relabelled"] = "given"
    """Labels as drawn; drawn again from sigmoid of the reward model's margin; the sign of that margin."""
    part: Literal["all", "amplify", "dampen"] = "all"
    """Part of MADPO's weight in use: amplify leaves 1 for margins above tau, dampen for margins within -tau and tau."""

    @property
    def needs_margin(self) -> bool:
        """Whether the training depends on the reward model."""
        return self.loss.spec.needs_margin or self.labels != "given"


def train(world: World, recipes: Sequence[Recipe], *, seed: int, steps: int = STEPS) -> np.ndarray:
    """theta [S, D, M] of every policy on every seed's pairs.

    Args:
        world: the pairs.
        recipes: one per policy.
        seed: draws the order of the pairs, redrawn labels and beta-DPO's pairs.
        steps: number of steps of ``BATCH`` pairs, over as many epochs as that takes.
    """
    trainer = _Trainer(world, recipes, seed)
    x = torch.from_numpy(world.features)
    seeds, _, _, size = x.shape
    theta = torch.zeros(seeds, size, len(recipes), dtype=torch.float64)
    mean, square = torch.zeros_like(theta), torch.zeros(seeds, 1, len(recipes), dtype=torch.float64)
    for step, rows in enumerate(_batches(x.shape[1], seed, steps)):
        theta.requires_grad_(True)
        loss = trainer.loss(x[:, rows], theta, rows)
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            mean = FIRST * mean + (1 - FIRST) * gradient
            square = SECOND * square + (1 - SECOND) * gradient.square().sum(dim=1, keepdim=True)
            unbiased = mean / (1 - FIRST ** (step + 1))
            scale = (square / (1 - SECOND ** (step + 1))).sqrt().clamp_min(1e-12)
            rate = RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
            theta = theta - rate * unbiased / scale
    return theta.detach().numpy()


def _batches(pairs: int, seed: int, steps: int) -> list[Tensor]:
    """Rows of each step's batch: epoch after epoch of all pairs, each in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // pairs)
    order = torch.cat([torch.randperm(pairs, generator=generator) for _ in range(epochs)])
    return list(order[: steps * BATCH].view(steps, BATCH))


class _Trainer:
    """Sum of the policies' losses; keeps beta-DPO's statistics between steps."""

    def __init__(self, world: World, recipes: Sequence[Recipe], seed: int) -> None:
        self.recipes = recipes
        rng = np.random.default_rng(seed)
        redrawn = rng.random(world.margin.shape) > 1 / (1 + np.exp(-world.margin))
        self.turned = {
            "given": torch.zeros(world.margin.shape, dtype=torch.bool),
            "redrawn": torch.from_numpy(redrawn),
            "relabelled": torch.from_numpy(world.margin < 0),
        }
        self.margin = torch.from_numpy(world.margin)
        slopes = [calibrated_slope(m) if (m < 0).any() else 1.0 for m in world.margin]
        self.calibrated = self.margin * torch.tensor(slopes, dtype=torch.float64)[:, None]
        self.generator = torch.Generator().manual_seed(seed)
        other = [r.loss.spec.name for r in recipes if not r.loss.spec.from_logps and r.loss.spec.name != "beta_dpo"]
        if other:
            raise ValueError(f"{', '.join(other)}: the arena has no statistics and no tokens for it")
        self.states = {k: [BetaDpoState()] * len(world.margin) for k, r in enumerate(recipes) if r.loss.spec.coupled}

    def loss(self, x: Tensor, theta: Tensor, rows: Tensor) -> Tensor:
        """Sum over seeds and policies of the mean loss of a batch x [S, B, R, D]."""
        seeds, batch, responses, size = x.shape
        logits = (x.reshape(seeds, batch * responses, size) @ theta).view(seeds, batch, responses, -1)
        logps = torch.log_softmax(logits, dim=2)[:, :, :2].permute(2, 3, 0, 1).reshape(2, -1, seeds * batch)
        total = torch.zeros((), dtype=torch.float64)
        even = torch.full((seeds * batch,), -float(np.log(responses)), dtype=torch.float64)
        length = torch.ones_like(even)
        each = zip(self.recipes, logps[0].unbind(), logps[1].unbind(), strict=True)
        for k, (recipe, first, second) in enumerate(each):
            turned = self.turned[recipe.labels][:, rows].reshape(-1)
            chosen, rejected = torch.where(turned, second, first), torch.where(turned, first, second)
            pairs = PairLogps(chosen, rejected, even, even, length, length)
            if recipe.loss.spec.coupled:
                total = total + self._beta_dpo(k, recipe.loss, pairs, seeds)
                continue
            total = total + recipe.loss(pairs, self._margin(recipe)[:, rows].reshape(-1)).sum()
        return total / batch

    def _margin(self, recipe: Recipe) -> Tensor:
        """Margins [S, N] that a policy's loss reads."""
        if recipe.part == "all":
            return self.calibrated if recipe.loss.spec.name == CALIBRATED else self.margin
        tau = float(recipe.loss.parameters["tau"])
        if recipe.part == "amplify":
            return self.margin.clamp(max=tau)
        return torch.where(self.margin.abs() < tau, torch.zeros_like(self.margin), self.margin)

    def _beta_dpo(self, policy: int, loss: BoundLoss, pairs: PairLogps, seeds: int) -> Tensor:
        """Sum of beta-DPO's loss; each seed has its own beta, kept pairs and statistics."""
        gaps = pairs.log_ratio_gap.detach().view(seeds, -1)
        found = []
        for k, gap in enumerate(gaps):
            beta, keep, self.states[policy][k] = beta_dpo_step(
                gap, self.states[policy][k], generator=self.generator, **loss.parameters
            )
            found.append((beta, keep))
        kept = torch.stack([keep for _, keep in found])
        betas = torch.tensor([beta for beta, _ in found], dtype=torch.float64).repeat_interleave(kept.shape[1])
        nothing = torch.zeros_like(betas)
        chosen, rejected = betas * pairs.chosen_ratio, betas * pairs.rejected_ratio
        scaled = PairLogps(chosen, rejected, nothing, nothing, pairs.chosen_length, pairs.rejected_length)
        share = float(kept[0].double().mean())
        return beta_dpo(scaled, beta=1.0, keep=kept.view(-1), scale=1 / share).sum()
