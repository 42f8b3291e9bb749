"""Are the predictions true? Real optimizer steps on a copy of the model, observed against predicted changes.

The optimizer takes its warm-up steps and one more; that last update is then taken in part: at a share s of it the
predicted change of every log-prob is s times the derivative along it, and the error must fall as s^2.
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
    """Sign agreement and order of the error for each optimizer.

    Args:
        model: policy and, before any step, its own reference.
        batch: pairs that the steps train on.
        probes: pairs whose changes are predicted; may be others.
        loss: any registered loss but beta_dpo.
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
    with torch.no_grad():
        reference = pair_logps(policy, batch, "concatenated")
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    optimizer = OPTIMIZERS[optimizer_name](trained.values(), rate)
    before: dict[str, Tensor] = {}
    for _ in range(WARM_UP + 1):
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        found = pair_logps(policy, batch, "concatenated")
        logps = PairLogps(found.chosen, found.rejected, reference.chosen, reference.rejected, *found[2:4])
        optimizer.zero_grad()
        loss(logps, margin).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        optimizer.step()
    update = {name: (parameter.detach() - before[name]) for name, parameter in trained.items()}
    _set(trained, before, update, 0.0)
    log.info("check %s: predicting %d log-probs along its update", optimizer_name, len(probes["input_ids"]))
    products = GradientProducts(policy)(probes, update)
    predicted = torch.cat([products.chosen_along, products.rejected_along]).cpu()
    start, noise = _logps(policy, probes), _noise(policy, probes)
    steps = []
    for share in SHARES:
        _set(trained, before, update, share)
        observed = _logps(policy, probes) - start
        clear = (share * predicted).abs() > 10 * noise
        error = (observed - share * predicted).abs()
        steps.append(
            {
                "share_of_update": share,
                "compared": int(clear.sum()),
                "sign_agreement": float((observed.sign() == predicted.sign())[clear].double().mean()),
                "median_relative_error": float((error / (share * predicted).abs())[clear].median()),
                "rms_error_nats": float(error.square().mean().sqrt()),
            }
        )
    return {
        "learning_rate": rate,
        "log_probs": len(predicted),
        "rms_predicted_nats": float(predicted.square().mean().sqrt()),
        "noise_nats": noise,
        "steps": steps,
        "order_of_error": _order([step for step in steps if step["rms_error_nats"] > 3 * noise]),
    }


def _set(trained: dict[str, nn.Parameter], before: Direction, update: Direction, share: float) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name] + share * update[name])


def _logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = pair_logps(model, batch, "concatenated")
    return torch.cat([found.chosen, found.rejected]).double().cpu()


def _noise(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Largest change of a log-prob (nats) when the same pairs are computed one by one."""
    pairs = len(batch["input_ids"]) // 2
    alone = [_logps(model, {name: value[[k, k + pairs]] for name, value in batch.items()}) for k in range(pairs)]
    together = _logps(model, batch)
    return max(float((torch.stack(alone).T.flatten() - together).abs().max()), float(torch.finfo(torch.float32).eps))


def _order(steps: Sequence[dict[str, Any]]) -> float:
    """Slope of log error against log share: 2 where the prediction is right to first order.

    NaN where rounding hides the error at all but one share.
    """
    if len(steps) < 2:
        return math.nan
    share = torch.tensor([step["share_of_update"] for step in steps], dtype=torch.float64).log()
    error = torch.tensor([step["rms_error_nats"] for step in steps], dtype=torch.float64).log()
    share, error = share - share.mean(), error - error.mean()
    return float((share * error).sum() / (share * share).sum())
