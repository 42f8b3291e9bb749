"""Gradient products under the optimizer's preconditioner: what AdamW's step, not a plain one, does to a pair.

AdamW divides each coordinate of a gradient by sqrt(v) + eps, so a small step on one pair changes its chosen log-prob by
d_w <gw, P gw> - d_l <gw, P gl> with P = diag(1 / (sqrt(v) + eps)), to first order in the step and at a v that the pair
itself does not change. v is that of a checkpoint (``exp_avg_sq``, bias-corrected), or of the first step of a training,
where v is the square of the batch's gradient G and the step is sign(G).

Two backward passes per pair with gradients of all weights, for any number of losses.
"""

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError  # nosec B403 - what torch.load raises with weights_only
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from align.entanglement.adam_states import OPTIMIZER, optimizer_order
from align.entanglement.products import GradientProducts
from align.errors import DataError
from align.models.layout import base_model
from align.models.logps import add_completion_head, pair_logps
from align.models.tokenization import collate

FIRST_STEP = "first-step"
"""In place of a checkpoint: AdamW's first step on the measured pairs."""
EPS = 1e-8
MAX_GRAD_NORM = 1.0
"""Of a training's first step."""
Scale = dict[str, Tensor]
"""Name of a measured parameter -> the diagonal of P."""


def of_checkpoint(model: nn.Module, checkpoint: Path) -> Scale:
    """P of the AdamW state of a checkpoint.

    Args:
        model: the checkpoint's model, trained parameters as in the training.
        checkpoint: folder with ``optimizer.pt``, as transformers writes it; a finished run keeps none.

    Raises:
        DataError: there is no such file, it is not AdamW's, or it is that of another model.
    """
    file = checkpoint / OPTIMIZER
    if not file.is_file():
        raise _unusable(file, "not found", "a checkpoint of a training that is not finished has it")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        groups, states = saved["param_groups"], saved["state"]
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise _unusable(file, f"cannot be read ({type(error).__name__})", "copy the checkpoint again") from None
    names = optimizer_order(model)
    numbers = [number for group in groups for number in group["params"]]
    trained = dict(model.named_parameters())
    found = [states.get(number, {}).get("exp_avg_sq") for number in numbers]
    if any(value is None or not value.is_floating_point() for value in found):
        raise _unusable(
            file, "holds no exp_avg_sq of every parameter", "only the state of AdamW in full precision is read"
        )
    if [tuple(value.shape) for value in found] != [tuple(trained[name].shape) for name in names]:
        raise _unusable(file, f"is of {len(numbers)} parameters", f"--model trains {len(names)} of other shapes")
    betas = {number: group["betas"][1] for group in groups for number in group["params"]}
    scale = {}
    for name, number, value in zip(names, numbers, found, strict=True):
        corrected = value.float() / (1 - betas[number] ** float(states[number]["step"]))
        scale[name] = 1 / (corrected.sqrt() + EPS)
    return scale


def of_first_step(products: GradientProducts, batches: "PairBatches", d_w: Tensor, d_l: Tensor) -> Scale:
    """P of AdamW's first step on all pairs: 1 / (|G| + eps), G clipped to norm 1.

    Args:
        products: the model and its measured parameters.
        batches: the pairs, N of them.
        d_w: weight of each pair's chosen gradient under the loss of that step, [N].
        d_l: weight of its rejected gradient, [N].
    """
    total = {name: torch.zeros_like(weight) for name, weight in products.measured.items()}
    for k, batch in enumerate(batches):
        logps = pair_logps(products.model, batch, "concatenated")
        loss = (float(d_l[k]) * logps.rejected - float(d_w[k]) * logps.chosen).sum() / len(batches)
        for name, slope in zip(total, _grads(loss, products), strict=True):
            total[name] += slope
    norm = float(torch.stack([value.double().norm() for value in total.values()]).norm())
    clip = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
    return {name: 1 / ((value * clip).abs() + EPS) for name, value in total.items()}


class PairBatches:
    """Tokenized pairs as batches of one pair, in their order."""

    def __init__(self, rows: Dataset, pad_token_id: int, max_length: int, device: str) -> None:
        self.rows, self.pad_token_id, self.max_length, self.device = rows, pad_token_id, max_length, device

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for k in range(len(self.rows)):
            batch = collate(self.rows.select([k]), self.pad_token_id, max_length=self.max_length)
            yield {name: value.to(self.device) for name, value in batch.items()}


def preconditioned(table: Dataset, products: GradientProducts, batches: PairBatches, scale: Scale) -> Dataset:
    """``table`` with ``chosen_sq``, ``rejected_sq`` and ``inner`` replaced by <gw, P gw>, <gl, P gl> and <gw, P gl>.

    Args:
        table: rows of ``measure_pairs``.
        products: the model and its measured parameters.
        batches: the same pairs.
        scale: P.
    """
    weights = [scale[name].to(parameter.device) for name, parameter in products.measured.items()]
    found: dict[str, list[float]] = {"chosen_sq": [], "rejected_sq": [], "inner": []}
    for batch in batches:
        logps = pair_logps(products.model, batch, "concatenated")
        up = _grads(logps.chosen.sum(), products, keep=True)
        down = _grads(logps.rejected.sum(), products)
        for name, one, other in (("chosen_sq", up, up), ("rejected_sq", down, down), ("inner", up, down)):
            parts = zip(one, other, weights, strict=True)
            found[name].append(sum(float((a * b * p).sum(dtype=torch.float64)) for a, b, p in parts))
    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    return Dataset.from_dict(columns | found)


def measured_by(model: nn.Module, parameters: str | None) -> GradientProducts:
    """The measured parameters of a model that can score completion tokens."""
    add_completion_head(base_model(model))
    return GradientProducts(model, parameters)


def _grads(value: Tensor, products: GradientProducts, keep: bool = False) -> list[Tensor]:
    weights = list(products.measured.values())
    return list(torch.autograd.grad(value, weights, retain_graph=keep, materialize_grads=True))


def _unusable(file: Path, found: str, hint: str) -> DataError:
    return DataError(f"--optimizer: {file}: {found}", code="optimizer-state", hint=hint)
