"""What a change of the parameters does to every token's log-prob, to first order, by one forward-mode pass.

For any direction u in parameter space the derivative of log p(y) along u is <grad log p(y), u>. With u the gradient of
the other response it is the gradient product of every single token. Where only the sums over a response are wanted, as
along an optimizer's update, ``GradientProducts`` has them for less.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from align.entanglement.directional import Direction
from align.models.layout import base_model


def directional_logps(model: nn.Module, batch: dict[str, Tensor], direction: Direction) -> tuple[Tensor, Tensor]:
    """Log-probs of every completion token and their derivatives along ``direction``, each [2B, T - 1], nats.

    Args:
        model: causal language model, with its adapter if it has one.
        batch: right-padded, in trl's layout; values at tokens that carry no loss are 0.
        direction: parameter name -> tensor of its shape; parameters that are left out do not move.
    """
    mask = batch["completion_mask"][:, 1:].bool()
    parameters = dict(model.named_parameters())
    with torch.no_grad(), _forward_mode(model), forward_ad.dual_level():
        moved = {name: forward_ad.make_dual(parameters[name], u) for name, u in direction.items()}
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        first = int(mask.any(dim=0).int().argmax())  # before it no row has a scored token
        kept = mask.shape[1] - first
        logits = functional_call(model, moved, (), inputs | {"logits_to_keep": kept + 1}).logits[:, :-1]
        targets = batch["input_ids"][:, -kept:, None]
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(2, targets)[..., 0]
        value, tangent = forward_ad.unpack_dual(logps)
        if tangent is None:
            tangent = torch.zeros_like(value)
    value, tangent = (F.pad(found, (first, 0)).masked_fill(~mask, 0) for found in (value, tangent))
    return value, tangent


@contextmanager
def _forward_mode(model: nn.Module) -> Iterator[None]:
    """Attention that has forward derivatives, no dropout, no activation checkpointing."""
    base, training = base_model(model), model.training
    checkpointing = getattr(base, "is_gradient_checkpointing", False)
    if checkpointing:
        base.gradient_checkpointing_disable()
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.train(training)
        if checkpointing:
            base.gradient_checkpointing_enable()
