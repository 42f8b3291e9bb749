"""Inner products of per-sequence gradients, one rule per layer type, from its inputs and its output gradients.

For a linear layer y = x W^T the gradient of one sequence is G = e^T x (x: inputs, e: gradients at the outputs), and

    <G_a, G_b> = sum_{s,t} (x_a[s] . x_b[t]) (e_a[s] . e_b[t])

so two T x T Gram matrices give the product without G (Goodfellow, arXiv 1510.01799; ghost clipping, Li et al.,
arXiv 2110.05679), and so do the two G; each layer takes the cheaper by counted operations. Sums are in float64.

Legend: B pairs, rows k and B + k of a [2B, ...] tensor are the chosen and the rejected sequence of pair k, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from align.errors import ConfigError, ModelError


@dataclass(slots=True)
class Input:
    """Input of a layer. Layers that read the same tensor share one, and with it its Gram matrices."""

    value: Tensor
    grams: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True)
class Call:
    """One call of a module in the forward pass: its input, and the gradient at its output."""

    module: nn.Module
    name: str
    """Name of the parameter within the module."""
    input: Input
    grad: Tensor
    """Gradient at the output."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of parameter is measured."""

    sample_grads: Callable[[Call], Tensor]
    """Per-sequence gradients [2B, P] of the parameter (Opacus's ``grad_sample``)."""
    products: Callable[[Call], Tensor] | None = None
    """|gw|^2, |gl|^2 and <gw, gl>, [3, B], where that is cheaper; None: by ``sample_grads``."""

    def pair_products(self, call: Call) -> Tensor:
        """|gw|^2, |gl|^2 and <gw, gl> of a call, [3, B], float64."""
        return products_of_grads(self.sample_grads(call)) if self.products is None else self.products(call)


def products_of_grads(sample_grads: Tensor) -> Tensor:
    """|gw|^2, |gl|^2 and <gw, gl>, [3, B], float64, from per-sequence gradients [2B, P]."""
    chosen, rejected = sample_grads.chunk(2)
    return torch.stack(
        [
            (a * b).sum(dim=1, dtype=torch.float64)
            for a, b in ((chosen, chosen), (rejected, rejected), (chosen, rejected))
        ]
    )


def products_of_grams(own_x: Tensor, cross_x: Tensor, own_e: Tensor, cross_e: Tensor) -> Tensor:
    """|gw|^2, |gl|^2 and <gw, gl>, [3, B], float64, from Gram matrices of inputs and of output gradients.

    Args:
        own_x: inner products of the inputs within each sequence, [2B, T, T].
        cross_x: those between chosen and rejected, [B, T, T].
        own_e: inner products of the output gradients, as ``own_x``.
        cross_e: as ``cross_x``.
    """
    squares = (own_x * own_e).sum(dim=(1, 2), dtype=torch.float64)
    inner = (cross_x * cross_e).sum(dim=(1, 2), dtype=torch.float64)
    return torch.stack([*squares.chunk(2), inner])


def grams(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of the tokens of each sequence [2B, T, T], and of chosen with rejected tokens [B, T, T]."""
    chosen, rejected = rows.chunk(2)
    return rows @ rows.mT, chosen @ rejected.mT


def _linear_products(call: Call) -> Tensor:
    x, e = call.input.value, call.grad
    tokens, d_in, d_out = x.shape[1], x.shape[-1], e.shape[-1]
    grams_cost = 3 * tokens * tokens * ((0 if call.input.grams else d_in) + d_out)
    grads_cost = (2 * tokens + 3) * d_in * d_out
    if grads_cost < grams_cost:
        half = len(x) // 2
        pairs = ([k, k + half] for k in range(half))
        return torch.cat([products_of_grads((e[pair].mT @ x[pair]).flatten(1)) for pair in pairs], dim=1)
    if call.input.grams is None:
        call.input.grams = grams(x)
    return products_of_grams(*call.input.grams, *grams(e))


def _linear_grads(call: Call) -> Tensor:
    return (call.grad.mT @ call.input.value).flatten(1)


def _bias_grads(call: Call) -> Tensor:
    return call.grad.flatten(1, -2).sum(dim=1)


def table_grad(module: nn.Module, ids: Tensor, grad: Tensor) -> Tensor:
    """Gradient at the rows of an embedding's table, [2B, T, D], from that at its output.

    A row is multiplied by ``embed_scale`` where the module has one; the row of ``padding_idx`` gets no gradient, as in
    ``torch.nn.Embedding``. Models of the hub often pad with a token that prompts contain, such as the end of a turn.

    Args:
        module: the embedding.
        ids: [2B, T].
        grad: [2B, T, D].
    """
    scale, padding = getattr(module, "embed_scale", None), getattr(module, "padding_idx", None)
    if scale is not None:
        grad = grad * scale
    return grad if padding is None else grad.masked_fill((ids == padding)[..., None], 0.0)


def _embedding_grads(call: Call) -> Tensor:
    """Gradients of the rows of the table that the batch uses, concatenated."""
    used, place = call.input.value.unique(return_inverse=True)
    grads = call.grad.new_zeros(len(place), len(used), call.grad.shape[-1])
    rows = torch.arange(len(place), device=place.device)[:, None].expand_as(place)
    grads.index_put_((rows, place), table_grad(call.module, call.input.value, call.grad), accumulate=True)
    return grads.flatten(1)


def _embedding_products(call: Call) -> Tensor:
    """Products in which tokens with the same id share a row of the table."""
    grad = table_grad(call.module, call.input.value, call.grad)
    chosen, rejected = call.input.value.chunk(2)
    same_own = (call.input.value[:, :, None] == call.input.value[:, None]).to(grad.dtype)
    same_cross = (chosen[:, :, None] == rejected[:, None]).to(grad.dtype)
    return products_of_grams(same_own, same_cross, *grams(grad))


def _scale_grads(call: Call) -> Tensor:
    """Gradients of a one-dimensional weight in which the module is affine (RMSNorm, LayerNorm, also Gemma's 1 + w).

    The weight multiplies the output at weight 1 minus the output at weight 0, whatever the module's formula; the latter
    is computed only if a probe input shows that it is not 0.
    """
    weight, x = call.module.get_parameter(call.name), call.input.value
    with torch.no_grad():
        multiplied = _output(call, torch.ones_like(weight), x)
        zero = torch.zeros_like(weight)
        if _output(call, zero, torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype, device=x.device)[None]).any():
            multiplied = multiplied - _output(call, zero, x)
    return (call.grad * multiplied).flatten(1, -2).sum(dim=1)


def _output(call: Call, weight: Tensor, x: Tensor) -> Tensor:
    output: Tensor = functional_call(call.module, {call.name: weight}, (x,))
    return output


LINEAR = Rule(_linear_grads, _linear_products)
BIAS = Rule(_bias_grads)
EMBEDDING = Rule(_embedding_grads, _embedding_products)
SCALE = Rule(_scale_grads)


@dataclass(frozen=True)
class Registry:
    """Rules by layer type; ``register`` adds one for a layer of your own."""

    types: dict[type[nn.Module], dict[str, Rule]] = field(default_factory=dict)

    def register(self, kind: type[nn.Module], **rules: Rule) -> None:
        """Set the rules of the parameters of ``kind``, by name; not of its subclasses, which may compute otherwise.

        A rule is compared with autograd on random inputs before it is used.

        Raises:
            ConfigError: ``kind`` is no class of layers or one that this program has rules for, or a rule is none.
        """
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise _no_rule(f"found {kind!r:.60}, expected a class of layers")
        if kind in BUILT_IN:
            raise _no_rule(f"{kind.__name__} has rules already, expected a class of your own")
        if wrong := next((name for name, rule in rules.items() if not isinstance(rule, Rule)), None):
            raise _no_rule(f"{kind.__name__}: {wrong}={rules[wrong]!r:.60}, expected a Rule, such as LINEAR or BIAS")
        if not rules:
            raise _no_rule(f"{kind.__name__}: found no rule, expected one by the name of a parameter: weight=LINEAR")
        self.types[kind] = rules

    def find(self, module: nn.Module, name: str) -> Rule | None:
        """The rule for a parameter of a module; None: it is measured by autograd."""
        if type(module) in self.types:
            return self.types[type(module)].get(name)
        if type(module).__name__.endswith("RMSNorm") and name == "weight" and module.get_parameter(name).dim() == 1:
            return SCALE
        if type(module).__name__.endswith("ScaledWordEmbedding") and name == "weight":
            return EMBEDDING
        return None


def _no_rule(message: str) -> ConfigError:
    return ConfigError(
        f"RULES.register: {message}", code="entanglement-rule", hint="docs/python.md has an example of a layer rule"
    )


BUILT_IN: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: {"weight": LINEAR, "bias": BIAS},
    Conv1D: {"weight": LINEAR, "bias": BIAS},
    nn.Embedding: {"weight": EMBEDDING},
    nn.LayerNorm: {"weight": SCALE, "bias": BIAS},
}
"""Rules that this program brings."""
RULES = Registry(dict(BUILT_IN))


def check_measurable(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse parameters that are not floating-point tensors of this process (quantized, sharded).

    Raises:
        ModelError: names the first such parameter.
    """
    for name, parameter in parameters.items():
        if not parameter.is_floating_point() or parameter.is_meta or type(parameter) is not nn.Parameter:
            raise ModelError(
                f"{name}: gradients of a parameter of type {type(parameter).__name__} ({parameter.dtype}) are not "
                "measured",
                code="entanglement-parameter",
                hint="measure an adapter, or name other parameters",
            )
