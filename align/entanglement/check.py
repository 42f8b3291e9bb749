"""Compare predicted with observed changes over real optimizer steps on a copy of the model.

The optimizer takes its warm-up steps and one more. Of that last update only a share s is then applied: the predicted
change of every log-prob is s times its directional derivative along the update, and the error must fall as s^2.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.entanglement.directional import Direction
from align.entanglement.products import GradientProducts
from align.io.console import log
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.models.layout import base_model
from align.models.logps import add_completion_head, pair_logps

SHARES = (1.0, 0.5, 0.25, 0.125)
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01),
}
MAX_GRAD_NORM = 1.0
WARM_UP = 2


def check_predictions(
    model: nn.Module,
    batch: dict[str, Tensor],
    probes: dict[str, Tensor],
    loss: BoundLoss,
    rates: dict[str, float],
    *,
    margin: Tensor | None = None,
) -> dict[str, Any]:
    """Measure sign agreement and order of the error for each optimizer.

    Args:
        model: the policy; before any step it is the reference too.
        batch: pairs that the steps train on.
        probes: pairs whose changes are predicted; they may differ from ``batch``.
        loss: any loss of the log-probs of one pair (``from_logps``).
        rates: name in ``OPTIMIZERS`` -> learning rate.
        margin: [B] of ``batch``, for losses that need one.
    """
    return {name: _check_one(model, batch, probes, loss, name, rate, margin) for name, rate in rates.items()}


def _check_one(
    model: nn.Module,
    batch: dict[str, Tensor],
    probes: dict[str, Tensor],
    loss: BoundLoss,
    optimizer_name: str,
    rate: float,
    margin: Tensor | None,
) -> dict[str, Any]:
    policy = copy.deepcopy(model).eval()
    add_completion_head(base_model(policy))
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    optimizer = OPTIMIZERS[optimizer_name](trained.values(), rate)
    before, update = _last_update(policy, trained, batch, loss, optimizer, margin)
    _set(trained, before, update, 0.0)
    log.info("check %s: predicting %d log-probs along its update", optimizer_name, len(probes["input_ids"]))
    products = GradientProducts(policy)(probes, update)
    predicted = torch.cat([products.chosen_jvp, products.rejected_jvp]).cpu()
    start, noise = _logps(policy, probes), _noise(policy, probes)
    steps = []
    for share in SHARES:
        _set(trained, before, update, share)
        steps.append(_compare(share, share * predicted, _logps(policy, probes) - start, noise))
    return {
        "learning_rate": rate,
        "log_probs": len(predicted),
        "rms_predicted_nats": float(predicted.square().mean().sqrt()),
        "noise_nats": noise,
        "steps": steps,
        "order_of_error": _order([step for step in steps if step["rms_error_nats"] > 3 * noise]),
    }


def _last_update(
    policy: nn.Module,
    trained: dict[str, nn.Parameter],
    batch: dict[str, Tensor],
    loss: BoundLoss,
    optimizer: torch.optim.Optimizer,
    margin: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train for ``WARM_UP`` steps and one more; return the parameters before the last step, and its update."""
    with torch.no_grad():
        reference = pair_logps(policy, batch, "concatenated")
    before: dict[str, Tensor] = {}
    for _ in range(WARM_UP + 1):
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        current = pair_logps(policy, batch, "concatenated")
        logps = PairLogps(current.chosen, current.rejected, reference.chosen, reference.rejected, *current[2:4])
        optimizer.zero_grad()
        loss(logps, margin).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        optimizer.step()
    return before, {name: (parameter.detach() - before[name]) for name, parameter in trained.items()}


def _compare(share: float, predicted: Tensor, observed: Tensor, noise: float) -> dict[str, Any]:
    """Compare changes [2B] (nats) at one share of the update; signs and ratios of those clearly above the noise."""
    clear = predicted.abs() > 10 * noise
    error = (observed - predicted).abs()
    return {
        "share_of_update": share,
        "compared": int(clear.sum()),
        "sign_agreement": float((observed.sign() == predicted.sign())[clear].double().mean()),
        "median_relative_error": float((error / predicted.abs())[clear].median()),
        "rms_error_nats": float(error.square().mean().sqrt()),
    }


def _set(trained: dict[str, nn.Parameter], before: Direction, update: Direction, share: float) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name] + share * update[name])


def _logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logps = pair_logps(model, batch, "concatenated")
    return torch.cat([logps.chosen, logps.rejected]).double().cpu()


def _noise(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Largest change of a log-prob (nats) when the same pairs are computed one by one."""
    pairs = len(batch["input_ids"]) // 2
    alone = [_logps(model, {name: value[[k, k + pairs]] for name, value in batch.items()}) for k in range(pairs)]
    together = _logps(model, batch)
    return max(float((torch.stack(alone).T.flatten() - together).abs().max()), float(torch.finfo(torch.float32).eps))


def _order(steps: Sequence[dict[str, Any]]) -> float:
    """Slope of log error against log share: 2 if the prediction is right to first order.

    NaN if rounding hides the error at all shares but one.
    """
    if len(steps) < 2:
        return math.nan
    share = torch.tensor([step["share_of_update"] for step in steps], dtype=torch.float64).log()
    error = torch.tensor([step["rms_error_nats"] for step in steps], dtype=torch.float64).log()
    share, error = share - share.mean(), error - error.mean()
    return float((share * error).sum() / (share * share).sum())
