"""Rules of the caller's own for a layer are compared with autograd before any product is measured by them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from align.entanglement.layer_rules import BUILT_IN, RULES, Call, Input, Rule, products_of_grads
from align.errors import ModelError

TOLERANCE = 1e-3
"""Of products, relative to the larger norm: rounding of float32 is far below, another formula far above."""
SEED = 0


class OwnRules:
    """Collects one layer of each type that the caller has registered, with its input, and checks their rules."""

    def __init__(self) -> None:
        self._layers: dict[type[nn.Module], tuple[nn.Module, Tensor]] = {}

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep a layer and its input in a forward pass, if its rules are the caller's."""
        if type(module) in RULES.types and type(module) not in BUILT_IN and args:
            self._layers[type(module)] = (module, args[0])

    def check(self) -> None:
        """Check the rules of each type.

        Raises:
            ModelError: see ``check_rules``.
        """
        for module, seen in self._layers.values():
            check_rules(module, RULES.types[type(module)], seen)


def check_rules(module: nn.Module, rules: dict[str, Rule], seen: Tensor) -> None:
    """Compare the rules of a layer with its gradients by autograd, on random inputs.

    Args:
        module: the layer.
        rules: name of a parameter -> its rule.
        seen: input of the layer for at least two sequences, [2, T, ...].

    Raises:
        ModelError: the layer has no parameter of that name, or a rule fails or gives other products.
    """
    name = type(module).__name__
    held = dict(module.named_parameters(recurse=False))
    known = {*held, *(key for key, value in module._parameters.items() if value is None)}
    for key, rule in rules.items():
        if key not in known:
            raise _refused(
                f"{name}: found a rule for {key!r}, expected one of its parameters {', '.join(sorted(known))}"
            )
        if key in held:
            _check_rule(module, key, rule, seen)


def _check_rule(module: nn.Module, key: str, rule: Rule, seen: Tensor) -> None:
    random = torch.Generator(seen.device).manual_seed(SEED)
    x = seen[:2].detach()
    if x.is_floating_point():
        x = torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)
    with torch.enable_grad():
        weight = module.get_parameter(key).detach().clone().requires_grad_(True)
        output = functional_call(module, {key: weight}, (x,))
        grad = torch.randn(output.shape, generator=random, device=x.device, dtype=output.dtype)
        rows = [torch.autograd.grad(output[k], weight, grad[k], retain_graph=True)[0].flatten() for k in range(2)]
    expected = products_of_grads(torch.stack(rows))
    with torch.no_grad():
        try:
            found = [products_of_grads(rule.sample_grads(Call(module, key, Input(x), grad)))]
            found += [] if rule.products is None else [rule.products(Call(module, key, Input(x), grad))]
        except Exception as error:
            raise _refused(
                f"the rule of {type(module).__name__}.{key} failed: {type(error).__name__}: {error}"
            ) from error
    scale = float(expected[:2].max())
    for products in found:
        if products.shape != expected.shape or not bool((products - expected).abs().max() <= TOLERANCE * scale):
            raise _refused(
                f"the rule of {type(module).__name__}.{key} gives the products {products.flatten().tolist()} "
                f"(|gw|^2, |gl|^2, <gw, gl>), autograd {expected.flatten().tolist()}"
            )


def _refused(message: str) -> ModelError:
    return ModelError(
        message, code="entanglement-rule", hint="leave the rule out: the layer is then measured by autograd, slower"
    )
