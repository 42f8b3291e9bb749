"""The gradient products of an adapter against autograd: adapters compute in ways that no rule here may know."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from align.entanglement.directional import gradient_of
from align.errors import ModelError
from align.models.adapters import trial_ids
from align.models.layout import base_model
from align.models.logps import add_completion_head, pair_logps

CODE = "entanglement-parameter"
TRIAL_ERROR = 0.05
"""Error of the products, relative to |gw| |gl|, that 16 bits explain."""


def compare_with_autograd(
    model: nn.Module,
    measure: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, Tensor]],
    measured: Mapping[str, nn.Parameter],
) -> None:
    """Compare the products of one pair of a few tokens with those of its gradients by autograd.

    Args:
        model: causal language model with an adapter.
        measure: |gw|^2, |gl|^2 and <gw, gl>, each [B], of a batch in trl's layout.
        measured: name -> parameter.

    Raises:
        ModelError: they differ.
    """
    ids, training = trial_ids(model), model.training
    completion = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] // 2).long().expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    found = measure(batch)
    add_completion_head(base_model(model))
    model.eval()
    with torch.enable_grad():
        tokens = pair_logps(model, batch, "concatenated").tokens.logps
        chosen, rejected = (gradient_of(row.sum(), measured) for row in tokens)
    model.train(training)
    true = [
        sum(float((a[name].double() * b[name]).sum()) for name in a.keys() & b.keys())
        for a, b in ((chosen, chosen), (rejected, rejected), (chosen, rejected))
    ]
    scale = math.sqrt(true[0] * true[1]) + torch.finfo(torch.float32).tiny
    pairs = zip(found, true, strict=True)
    error = max(abs(float(own) - expected) for own, expected in pairs) / scale
    if not error <= TRIAL_ERROR:
        raise ModelError(
            f"the gradient products of this adapter differ by {error:.2g} from those of autograd",
            code=CODE,
            hint="measure another kind of adapter",
        )
