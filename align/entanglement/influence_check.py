"""Compare predicted with realized changes of a held-out loss over one real optimizer step on each of several pairs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from align.data.held_out_pairs import WHOLE
from align.entanglement.directional import Direction, gradient_of
from align.entanglement.influence import (
    ADAMW,
    SGD,
    AdamState,
    InfluenceMeasurement,
    directions_of,
    held_out,
    held_out_losses,
)
from align.entanglement.measure_pairs import PairMeasurement
from align.errors import DataError
from align.io.console import log
from align.losses.pairwise import PairLogps
from align.models.logps import pair_logps

SIZES = (2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2)
"""Predicted change of the held-out loss by the pair that changes it most, as shares of that loss; each a step size."""
LONG = 1000.0
"""Steps behind the state of AdamW that is made where there is none: so many that one more hardly changes it."""
CLEAR = 3
"""A sign is compared where the predicted change is above this many times the noise."""


def check_influence(
    training: PairMeasurement,
    target: PairMeasurement,
    tokens: Dataset,
    held: Dataset,
    state: AdamState | None,
) -> dict[str, Any]:
    """Take one step on each pair alone, from the same weights, for growing step sizes, by SGD and by AdamW.

    The change by AdamW is the difference from a step without a gradient, which leaves momentum alone out. The weights
    are as before afterwards.

    Args:
        training: of the model, with the training loss.
        target: of the same model, with the held-out loss.
        tokens: training pairs, as ``tokenize_pairs`` returns them.
        held: held-out pairs.
        state: of AdamW; None: the one that a long training on these pairs would leave.

    Returns:
        For ``sgd`` and ``adamw``: ``steps``, one dictionary per step size with the learning rate, Pearson's correlation
        over the pairs, the agreement of signs, and the errors.

    Raises:
        DataError: fewer than three pairs, or no pair changes the held-out loss.
    """
    if len(tokens) < 3:
        raise DataError(
            f"the check correlates over pairs: found {len(tokens)}, expected at least 3",
            code="influence-pairs",
            hint="give more pairs, or raise --limit",
        )
    gradients = [_gradient(training, tokens.select([k])) for k in range(len(tokens))]
    made = state is None
    state = state or _long_training(gradients)
    groups = held_out(target, held, [WHOLE] * len(held))
    found = InfluenceMeasurement(training, directions_of(groups, state))(tokens)
    loss, noise = _with_noise(target, held)
    parameters = training.products.measured
    none = {name: torch.zeros_like(value) for name, value in parameters.items()}
    result: dict[str, Any] = {"pairs": len(tokens), "held_out": len(held), "held_out_loss": loss(), "noise": noise,
                              "adam_state": "made of these pairs" if made else "of the checkpoint"}  # fmt: skip
    for name, kind, share in (("sgd", SGD, 1.0), ("adamw", ADAMW, state.first_share)):
        per_rate = share * np.asarray(found[kind])
        largest = float(np.abs(per_rate).max())
        if not largest > 0 or not math.isfinite(largest):
            raise DataError(
                f"no pair changes the held-out loss: the largest influence is {largest}",
                code="influence-pairs",
                hint="another held-out loss, or a model whose loss still has a gradient",
            )
        log.info("check %s: %d step sizes, a step on each of %d pairs", name, len(SIZES), len(tokens))
        steps = []
        for size in SIZES:
            rate = size * (abs(loss()) or 1.0) / largest
            start = _after(parameters, none, name, rate, state, loss)
            changes = [_after(parameters, grad, name, rate, state, loss) - start for grad in gradients]
            steps.append({"learning_rate": rate, **_compare(rate * per_rate, np.asarray(changes), noise)})
        result[name] = {"steps": steps}
    return result


def _gradient(training: PairMeasurement, row: Dataset) -> Direction:
    """Gradient of the training loss of one pair, by autograd."""
    _, batch, margin = next(training.batches(row))
    return gradient_of(held_out_losses(training, batch, margin).sum(), training.products.measured)


def _long_training(gradients: list[Direction]) -> AdamState:
    """The state of AdamW after many steps on single pairs drawn from these, at the same weights."""
    names = {name for gradient in gradients for name in gradient}
    first = {name: sum(g[name] for g in gradients if name in g) / len(gradients) for name in names}
    second = {name: sum(g[name].square() for g in gradients if name in g) / len(gradients) for name in names}
    return AdamState(first, second, LONG, (0.9, 0.999), 1e-8)  # type: ignore[arg-type]


class _HeldOutLoss:
    """The mean held-out loss of a model that moves, under the reference that it has now."""

    def __init__(self, target: PairMeasurement, rows: Dataset) -> None:
        self.model, self.loss, self.count = target.products.model, target.loss, len(rows)
        self.parts: list[tuple[dict[str, Tensor], Tensor | None, tuple[Tensor, Tensor]]] = []
        for _, batch, margin in target.batches(rows):
            now = self._logps(batch)
            reference = target.reference_logps(batch) or (now[0], now[1])
            self.parts.append((batch, margin, reference))

    @torch.no_grad()
    def _logps(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Log-probs and lengths, each [B], float64 on the CPU."""
        return [values.double().cpu() for values in pair_logps(self.model, batch, "concatenated")[:4]]

    def __call__(self) -> float:
        """The mean over the pairs at the weights that the model has."""
        total = 0.0
        for batch, margin, (ref_chosen, ref_rejected) in self.parts:
            chosen, rejected, *lengths = self._logps(batch)
            pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, *lengths)
            total += float(self.loss(pairs, None if margin is None else margin.double()).sum())
        return total / self.count


def _with_noise(target: PairMeasurement, held: Dataset) -> tuple[_HeldOutLoss, float]:
    """The held-out loss, and by how much it changes when the same pairs are computed one by one."""
    loss = _HeldOutLoss(target, held)
    noise = abs(_HeldOutLoss(replace(target, batch_tokens=1), held)() - loss())
    return loss, max(noise, float(np.finfo(np.float32).eps) * abs(loss()))


def _after(
    parameters: Mapping[str, nn.Parameter],
    gradient: Direction,
    optimizer: str,
    rate: float,
    state: AdamState,
    loss: _HeldOutLoss,
) -> float:
    """The held-out loss after one real step with this gradient; the weights are then put back."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradient[name].clone() if name in gradient else None
    if optimizer == "sgd":
        torch.optim.SGD(parameters.values(), lr=rate).step()
    else:
        adamw = torch.optim.AdamW(parameters.values(), lr=rate, betas=state.betas, eps=state.eps, weight_decay=0.0)
        for name, parameter in parameters.items():
            if name in state.first:
                adamw.state[parameter] = {"step": torch.tensor(state.step), "exp_avg": state.first[name].clone(),
                                          "exp_avg_sq": state.second[name].clone()}  # fmt: skip
        adamw.step()
    value = loss()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
            parameter.grad = grads[name]
    return value


def _compare(predicted: np.ndarray, realized: np.ndarray, noise: float) -> dict[str, Any]:
    """Agreement of the changes [N] of a loss; signs of those clearly above the noise, errors of all."""
    clear = np.abs(predicted) > CLEAR * noise
    error = realized - predicted
    defined = predicted.std() > 0 and realized.std() > 0
    return {
        "largest_predicted": float(np.abs(predicted).max()),
        "pearson": float(np.corrcoef(predicted, realized)[0, 1]) if defined else None,
        "signs_compared": int(clear.sum()),
        "sign_agreement": float((np.sign(predicted) == np.sign(realized))[clear].mean()) if clear.any() else None,
        "rms_error_of_rms": float(np.sqrt(np.square(error).mean() / np.square(predicted).mean())),
        "changes": [[float(a), float(b)] for a, b in zip(predicted, realized, strict=True)],
    }
