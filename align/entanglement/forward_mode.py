"""Directional derivatives of every token's log-prob by one forward-mode pass (a Jacobian-vector product, JVP).

For any direction u in parameter space the derivative of log p(y) along u is <grad log p(y), u>. With u the gradient of
the other response it is the gradient product of every single token. For the sums over a response alone, as along an
optimizer's update, ``GradientProducts`` is cheaper.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from align.entanglement.directional import Direction
from align.models.layout import base_model


def logps_and_jvp(model: nn.Module, batch: dict[str, Tensor], direction: Direction) -> tuple[Tensor, Tensor]:
    """Log-probs of every completion token and their derivatives along ``direction``, each [2B, T - 1], nats.

    Args:
        model: causal language model, with its adapter if it has one.
        batch: right-padded, in trl's layout; values at tokens outside the completion mask are 0.
        direction: parameter name -> tensor of its shape; parameters that are left out do not move.
    """
    mask = batch["completion_mask"][:, 1:].bool()
    parameters = dict(model.named_parameters())
    with torch.no_grad(), _forward_mode_ready(model), forward_ad.dual_level():
        dual = {id(parameters[name]): forward_ad.make_dual(parameters[name], u) for name, u in direction.items()}
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        first = int(mask.any(dim=0).int().argmax())  # no row has a scored token before it
        kept = mask.shape[1] - first
        with _replaced(model, dual), _PaddingStays():
            logits = model(**inputs, logits_to_keep=kept + 1).logits[:, :-1]
        targets = batch["input_ids"][:, -kept:, None]
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(2, targets)[..., 0]
        value, tangent = forward_ad.unpack_dual(logps)
        if tangent is None:
            tangent = torch.zeros_like(value)
    value, tangent = (F.pad(part, (first, 0)).masked_fill(~mask, 0) for part in (value, tangent))
    return value, tangent


class _PaddingStays(TorchFunctionMode):
    """Give look-ups of ``padding_idx`` no derivative, as gradients have none; forward mode alone gives them one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.embedding:
            return output
        ids, weight, padding = inspect.signature(F.embedding).bind(*args, **(kwargs or {})).args[:3]
        value, tangent = forward_ad.unpack_dual(output)
        if padding is None or tangent is None:
            return output
        return forward_ad.make_dual(value, tangent.masked_fill((ids == padding % len(weight))[..., None], 0))


@contextmanager
def _forward_mode_ready(model: nn.Module) -> Iterator[None]:
    """Use attention that supports forward-mode AD, without dropout and without activation checkpointing."""
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


@contextmanager
def _replaced(model: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of parameters, given by ``id``, in every module that holds one, for a while.

    ``torch.func.functional_call`` does not, where modules share a parameter through one ParameterDict (peft's trained
    tokens of a tied model, the vector bank of VB-LoRA): the others keep a plain tensor, and the derivative is wrong.
    """
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in tensors
    ]
    try:
        for module, name, parameter in held:
            module._parameters[name] = tensors[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
