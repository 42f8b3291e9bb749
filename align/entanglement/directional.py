"""Each sequence of a batch moved along a direction in parameter space by a scalar of its own.

A module's output y becomes y + s_r * (derivative of y along its part of the direction) in row r, which is y at s = 0.
The derivative of anything by s_r is then its derivative along the direction through row r, and those of all rows come
from one backward pass through the activations.
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


@contextmanager
def moving(moves: Mapping[nn.Module, Direction], shift: Tensor) -> Iterator[None]:
    """Forward passes through ``moves``'s modules depend on ``shift`` [rows], which is to be zeros.

    Args:
        moves: what moves in each module. Its output has the rows of the batch in its first dimension.
        shift: one scalar per row.
    """

    def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the derivative is being computed
            return output
        with torch.no_grad():
            tangent = _tangent(module, moves[module], args, kwargs)
        scale = shift.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
        return output + scale * tangent

    hooks = [module.register_forward_hook(move, with_kwargs=True) for module in moves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tangent(module: nn.Module, move: Direction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Derivative of a module's output along ``move``, its input held fixed."""
    if type(module) is nn.Linear and "weight" in move:  # the output itself is not needed again
        return F.linear(args[0], move["weight"], move.get("bias"))
    with forward_ad.dual_level():
        moved = {name: forward_ad.make_dual(module.get_parameter(name), u) for name, u in move.items()}
        output = functional_call(module, moved, args, kwargs)
        tangent: Tensor = forward_ad.unpack_dual(output).tangent
    return tangent
