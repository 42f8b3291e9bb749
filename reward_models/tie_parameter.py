"""The tie parameter of an objective, learned together with the reward model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.io.files import write_json
from reward_models.registry import BoundObjective

FILE = "tie_parameter.json"
"""File of a reward model's folder with the tie parameter that it was trained to."""
DECAYS = (0.9, 0.99)
"""Adam's decays of the first and second moment, per optimizer step."""
SMALLEST = 1e-12


class TieParameter:
    """The logarithm of the tie parameter, and Adam over the gradients of optimizer steps.

    The gradient of a step is that of the mean loss of its pairs, over micro-batches and processes; it is applied before
    the first forward pass of the next step.

    Args:
        objective: has the parameters ``tie``, the start, and ``rate``, the learning rate; 0 keeps the start.
        gather: concatenates a tensor over the processes along its first dimension (all_gather).
    """

    def __init__(self, objective: BoundObjective, gather: Callable[[Tensor], Tensor]) -> None:
        self.objective = objective
        self.rate = float(objective.parameters["rate"])
        self.gather = gather
        start = torch.tensor(float(objective.parameters["tie"]), dtype=torch.float64).log()
        self.state: dict[str, float] = {"log": float(start), "mean": 0.0, "square": 0.0, "updates": 0.0}
        self.pending: dict[str, float] = {"step": -1.0, "gradient": 0.0, "pairs": 0.0}

    @property
    def value(self) -> float:
        """The parameter."""
        return float(torch.tensor(self.state["log"], dtype=torch.float64).exp())

    def bound(self, step: int | None) -> BoundObjective:
        """The objective with the parameter as it is at this step; None: outside the training."""
        if step is not None and step != self.pending["step"]:
            self._update()
            self.pending = {"step": float(step), "gradient": 0.0, "pairs": 0.0}
        return replace(self.objective, parameters={**self.objective.parameters, "tie": self.value})

    def see(self, chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor], real: Tensor | None) -> None:
        """Add the gradient of the pairs of a forward pass of the training.

        Args:
            chosen: rewards [B].
            rejected: rewards [B].
            columns: votes, each [B].
            real: bool [B], the pairs that count; None: all.
        """
        with torch.enable_grad():
            log = torch.tensor(self.state["log"], dtype=torch.float64, requires_grad=True)
            bound: Any = replace(self.objective, parameters={**self.objective.parameters, "tie": log.exp()})
            votes = {name: values.detach().double().cpu() for name, values in columns.items()}
            losses = bound(chosen.detach().double().cpu(), rejected.detach().double().cpu(), votes)
            losses = losses if real is None else losses[real.cpu()]
            gradient = torch.autograd.grad(losses.sum(), log)[0] if len(losses) else torch.zeros(())
        both = torch.tensor([[float(gradient), float(len(losses))]], dtype=torch.float64, device=chosen.device)
        total = self.gather(both).sum(dim=0).tolist()
        self.pending["gradient"] += total[0]
        self.pending["pairs"] += total[1]

    def _update(self) -> None:
        if not self.pending["pairs"] or not self.rate:
            return
        gradient, (first, second), state = self.pending["gradient"] / self.pending["pairs"], DECAYS, self.state
        state["updates"] += 1
        state["mean"] = first * state["mean"] + (1 - first) * gradient
        state["square"] = second * state["square"] + (1 - second) * gradient**2
        mean = state["mean"] / (1 - first ** state["updates"])
        square = state["square"] / (1 - second ** state["updates"])
        state["log"] -= self.rate * mean / (square**0.5 + SMALLEST)

    def write(self, folder: Path) -> None:
        """Write ``FILE`` into the folder of a trained model."""
        write_json(folder / FILE, {"objective": self.objective.spec.name, "tie": self.value})

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the state for a checkpoint."""
        return {"state": dict(self.state), "pending": dict(self.pending)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restore the state of a checkpoint."""
        self.state, self.pending = dict(state["state"]), dict(state["pending"])
