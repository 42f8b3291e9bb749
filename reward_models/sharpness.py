"""A penalty on the sharpness of a reward model: how fast its margins change with its parameters (arXiv 2503.04242).

With G(w) the mean margin of a batch, a Lagrange multiplier lambda keeps |grad G| near or below ``threshold`` /
``radius``: lambda * radius * (d/dw) |grad G| is added to the gradient of the loss, as the difference of two gradients,

    lambda * (radius / step) * (grad G(w + step * grad G / |grad G|) - grad G(w)),

and lambda rises by rate * (radius * |grad G| - threshold). It is clamped at 0, which the released code does not do. G
is the margin and not the reward: a constant that is added to all rewards has no effect.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.config import SharpnessSection
from align.errors import ConfigError

Reduce = Callable[[Tensor], Tensor]


class SharpnessPenalty:
    """The penalty and its multiplier.

    Args:
        config: threshold, radius and rates.
        model: the reward model, not wrapped by a launcher.
        reduce: mean of a tensor over all processes.

    Raises:
        ConfigError: ``parameters`` matches none of the trained parameters, or they are sharded.
    """

    def __init__(self, config: SharpnessSection, model: nn.Module, reduce: Reduce) -> None:
        self.config = config
        self.model = model
        self.reduce = reduce
        self.multiplier = config.start
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = [
            p for name, p in trained.items() if config.parameters is None or re.search(config.parameters, name)
        ]
        if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in self.parameters):
            raise ConfigError(
                "reward.sharpness: the parameters are sharded over processes, and the penalty perturbs unsharded ones",
                code="reward-sharpness",
                hint="train without FSDP or DeepSpeed, or leave `sharpness` out",
            )
        if not self.parameters:
            raise ConfigError(
                f"reward.sharpness.parameters: {config.parameters!r} matches no trained parameter",
                code="reward-sharpness",
                hint="names look like " + ", ".join(list(trained)[:2]),
            )

    def add(self, mean_margin: Callable[[], Tensor], scale: float = 1.0) -> float:
        """Add ``scale`` times the penalty's gradient to the parameters' gradients, and update the multiplier.

        Args:
            mean_margin: computes G with gradients, a scalar whose mean over the processes is the mean of all pairs.
            scale: pairs of the batch / pairs of the optimizer step.

        Returns:
            |grad G| over all processes.
        """
        with self._without_dropout():
            gradient = self._gradient(mean_margin)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
            if norm > 0 and self.multiplier > 0:
                factor = scale * self.multiplier * self.config.radius / self.config.step
                with _perturbed(self.parameters, gradient, self.config.step / norm):
                    perturbed = self._gradient(mean_margin)
                for parameter, first, second in zip(self.parameters, gradient, perturbed, strict=True):
                    added = (factor * (second - first)).to(parameter.dtype)
                    parameter.grad = added if parameter.grad is None else parameter.grad.add_(added)
        excess = self.config.radius * norm - self.config.threshold
        self.multiplier = max(0.0, self.multiplier + self.config.rate * excess)
        return norm

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.multiplier = state["multiplier"]

    def _gradient(self, mean_margin: Callable[[], Tensor]) -> list[Tensor]:
        """Compute grad G over all processes; 0 for parameters that the margins do not depend on."""
        gradient = torch.autograd.grad(mean_margin(), self.parameters, allow_unused=True)
        pairs = zip(gradient, self.parameters, strict=True)
        return [self.reduce(torch.zeros_like(p) if g is None else g.detach()) for g, p in pairs]

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Switch dropout off within the block: its noise would be divided by ``step``."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


@contextmanager
def _perturbed(parameters: list[nn.Parameter], direction: list[Tensor], factor: float) -> Iterator[None]:
    """Move the parameters to w + factor * direction within the block; afterwards they are w to the bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, direction, strict=True):
            parameter.add_(step.to(parameter.dtype), alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
