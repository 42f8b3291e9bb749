"""Directional derivatives of every sequence of a batch by one backward pass through the activations.

A module's output y becomes y + s_r * JVP in row r, where the JVP is the derivative of y along the module's part of the
direction; at s = 0 that is y. The derivative of anything by s_r is then its directional derivative through row r, and
one backward pass returns those of all rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

Direction = Mapping[str, Tensor]
"""Parameter of a model, or of one module -> tensor of its shape."""


def gradient_of(value: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of a number by parameters, those alone that it depends on; their ``grad`` stays as it is.

    By ``backward``: ``torch.autograd.grad`` of chosen inputs fails where activation checkpointing recomputes a head
    with trained tokens.
    """
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    value.backward(retain_graph=True)
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for name, parameter in parameters.items():
        parameter.grad = before[name]
    return found


@contextmanager
def shifted_along(directions: Mapping[nn.Module, Direction], shift: Tensor) -> Iterator[None]:
    """Let forward passes through the modules depend on ``shift`` [rows], which must be zeros.

    Args:
        directions: the direction of each module's parameters. Its output has the rows of the batch first.
        shift: one scalar per row.
    """

    def add_jvp(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the JVP itself is being computed
            return output
        with torch.no_grad():
            jvp = _module_jvp(module, directions[module], args, kwargs)
        scale = shift.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
        return output + scale * jvp

    hooks = [module.register_forward_hook(add_jvp, with_kwargs=True) for module in directions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _module_jvp(module: nn.Module, direction: Direction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Derivative of a module's output along ``direction`` with its input held fixed."""
    if type(module) is nn.Linear and "weight" in direction:  # the output itself is not needed again
        return F.linear(args[0], direction["weight"], direction.get("bias"))
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(module.get_parameter(name), u) for name, u in direction.items()}
        output = functional_call(module, dual, args, kwargs)
        tangent: Tensor = forward_ad.unpack_dual(output).tangent
    return tangent
