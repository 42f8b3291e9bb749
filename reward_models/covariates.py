"""Known causes of the label as covariates: in the training of a reward model, and out of its score.

If people prefer the longer response whatever it says, a reward model learns length. With the difference of lengths z as
a covariate the label is explained by  reward difference + a z,  where a is learned with the model and left out
afterwards: the rewards keep what length does not explain. It is right for a cause that should not count.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from align.errors import DataError
from align.io.files import write_json
from reward_models.length_bias import word_difference

LENGTH = "length"
"""Covariate that the texts give: the difference of their lengths in words."""
FILE = "covariates.json"
"""File of a reward model's folder with the covariates that it was trained with, and their coefficients."""
RATE, DECAYS, SMALLEST = 0.02, (0.9, 0.99), 1e-12
"""Adam's learning rate per optimizer step, decays and smallest divisor of the coefficients; z has mean square 1."""


def column_of(number: int) -> str:
    """Column of a tokenized table that holds a covariate."""
    return f"covariate_{number}"


def covariate_values(pairs: Dataset, names: Sequence[str]) -> np.ndarray:
    """Covariates [N, C] of pairs, chosen minus rejected, each divided by its root mean square.

    Args:
        pairs: pair table.
        names: ``length``, or columns of numbers that hold the difference, chosen minus rejected.

    Raises:
        DataError: a column is missing, has gaps or is all 0.
    """
    found = np.empty((len(pairs), len(names)))
    for k, name in enumerate(names):
        values = word_difference(pairs) if name == LENGTH else _numbers(pairs, name)
        size = float(np.sqrt(np.square(values).mean())) if len(values) else 0.0
        if size == 0:
            raise DataError(
                f"covariate {name}: found 0 for each of {len(pairs)} pairs, expected differences between the responses",
                code="reward-covariate",
                hint="leave it out",
            )
        found[:, k] = values / size
    return found


def _numbers(pairs: Dataset, name: str) -> np.ndarray:
    given = pairs[name] if name in pairs.column_names else []
    ids = pairs["id"] if "id" in pairs.column_names else range(len(pairs))
    wrong = [
        str(key)
        for key, value in zip(ids, given, strict=False)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value)
    ]
    if name not in pairs.column_names or wrong:
        what = f"no finite number in pairs {', '.join(wrong[:3])}" if wrong else "no such column"
        raise DataError(
            f"covariate {name}: found {what}, expected `length` or a column with the difference of the two responses, "
            "chosen minus rejected, in every pair",
            code="reward-covariate",
            hint="add the column to the pairs, or leave the covariate out",
        )
    return np.array(given, dtype=np.float64)


class Coefficients:
    """The coefficients of the covariates, and Adam over the gradients of optimizer steps.

    The gradient of a step is that of the mean loss of its pairs, over micro-batches and processes; it is applied before
    the first forward pass of the next step.

    Args:
        names: of the covariates.
        gather: concatenates a tensor over the processes along its first dimension (all_gather).
    """

    def __init__(self, names: Sequence[str], gather: Any) -> None:
        self.names = tuple(names)
        self.gather = gather
        zeros = [0.0] * len(self.names)
        self.state: dict[str, Any] = {"values": list(zeros), "mean": list(zeros), "square": list(zeros), "updates": 0}
        self.pending: dict[str, Any] = {"step": -1, "gradient": list(zeros), "pairs": 0.0}

    def shift(self, z: Tensor, step: int) -> Tensor:
        """What the covariates z [B, C] add to the margins [B] at this step; no gradient."""
        if step != self.pending["step"]:
            self._update()
            self.pending = {"step": step, "gradient": [0.0] * len(self.names), "pairs": 0.0}
        return z @ z.new_tensor(self.state["values"])

    def see(self, slopes: Tensor, z: Tensor, real: Tensor | None) -> None:
        """Add the gradient of the pairs of a forward pass.

        Args:
            slopes: derivative of each pair's loss in its margin, [B].
            z: [B, C].
            real: bool [B], the pairs that count; None: all.
        """
        counts = torch.ones_like(slopes) if real is None else real.to(slopes)
        local = torch.cat([(slopes * counts) @ z, counts.sum()[None]])[None]
        total = self.gather(local).double().sum(dim=0).tolist()
        self.pending["gradient"] = [a + b for a, b in zip(self.pending["gradient"], total[:-1], strict=True)]
        self.pending["pairs"] += total[-1]

    def _update(self) -> None:
        if not self.pending["pairs"]:
            return
        state, (first, second) = self.state, DECAYS
        gradient = np.array(self.pending["gradient"]) / self.pending["pairs"]
        state["updates"] += 1
        mean = first * np.array(state["mean"]) + (1 - first) * gradient
        square = second * np.array(state["square"]) + (1 - second) * gradient**2
        state["mean"], state["square"] = mean.tolist(), square.tolist()
        step = mean / (1 - first ** state["updates"])
        step /= np.sqrt(square / (1 - second ** state["updates"])) + SMALLEST
        state["values"] = (np.array(state["values"]) - RATE * step).tolist()

    def write(self, folder: Path) -> None:
        """Write ``FILE`` into the folder of a trained model."""
        write_covariates(folder, dict(zip(self.names, self.state["values"], strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"state": self.state, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.state, self.pending = dict(state["state"]), dict(state["pending"])


def write_covariates(folder: Path, values: Mapping[str, float]) -> None:
    """Write the coefficients, log-odds per root mean square of each covariate, which no score reads."""
    write_json(folder / FILE, {"coefficients": dict(values), "unit": "log-odds per root mean square"})
