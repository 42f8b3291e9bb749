"""The entanglement of single tokens: each token's inner product with the gradient of the other response."""

import re

import torch
from torch import Tensor, nn

from align.entanglement.directional import Direction, gradient_of
from align.entanglement.forward_mode import logps_and_jvp
from align.models.layout import base_model
from align.models.logps import add_completion_head, pair_logps

Trained = dict[str, nn.Parameter]


def token_products(model: nn.Module, batch: dict[str, Tensor], parameters: str | None = None) -> tuple[Tensor, Tensor]:
    """Inner products [T - 1] of every chosen token with gl, and of every rejected token with gw, for one pair.

    Both sum to <gw, gl>. The cost is one backward pass and one forward-mode pass per response.

    Args:
        model: causal language model; its trained parameters are measured.
        batch: one pair in trl's layout.
        parameters: regular expression for the names of the measured parameters; None: all that are trained.

    Returns:
        Values at place t - 1 for the token at place t; 0 for tokens outside the completion mask.
    """
    logps, trained = _token_logps(model, batch, parameters)
    products = []
    for row, other in ((0, 1), (1, 0)):
        direction = gradient_of(logps[other].sum(), trained)
        products.append(_along(model, batch, logps, direction, trained, row))
    return products[0], products[1]


def token_matrix(model: nn.Module, batch: dict[str, Tensor], parameters: str | None = None) -> Tensor:
    """Inner products [chosen tokens, rejected tokens] of the gradients of single tokens' log-probs, for one pair.

    The rows sum to the chosen tokens' products with gl, the columns to the rejected tokens' with gw (the heat map of
    arXiv 2410.13828). The cost is one backward and one forward-mode pass per token of the shorter response.

    Args:
        model: causal language model; its trained parameters are measured.
        batch: one pair in trl's layout.
        parameters: regular expression for the names of the measured parameters; None: all that are trained.
    """
    logps, trained = _token_logps(model, batch, parameters)
    places = [mask[1:].nonzero()[:, 0] for mask in batch["completion_mask"]]
    shorter, longer = (0, 1) if len(places[0]) < len(places[1]) else (1, 0)
    lines = []
    for place in places[shorter].tolist():
        direction = gradient_of(logps[shorter, place], trained)
        lines.append(_along(model, batch, logps, direction, trained, longer)[places[longer]])
    matrix = torch.stack(lines)
    return matrix if shorter == 0 else matrix.T


def _token_logps(model: nn.Module, batch: dict[str, Tensor], parameters: str | None) -> tuple[Tensor, Trained]:
    """Log-probs [2, T - 1] of the tokens without dropout, with gradients, and the trained parameters."""
    add_completion_head(base_model(model))
    training = model.training
    model.eval()
    logps = pair_logps(model, batch, "concatenated").tokens.logps
    model.train(training)
    return logps, {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameters is None or re.search(parameters, name))
    }


def _along(
    model: nn.Module, batch: dict[str, Tensor], logps: Tensor, direction: Direction, trained: Trained, row: int
) -> Tensor:
    """Derivatives [T - 1] of the log-probs of one row along ``direction``, 0 outside the completion mask.

    Layers without forward-mode AD (LoHa, RandLoRA) cost one backward pass per token.
    """
    try:
        return logps_and_jvp(model, batch, direction)[1][row]
    except NotImplementedError:
        products = torch.zeros_like(logps[row])
        for place in batch["completion_mask"][row, 1:].nonzero()[:, 0].tolist():
            gradient = gradient_of(logps[row, place], trained)
            products[place] = sum(
                (gradient[name] * direction[name]).sum() for name in gradient.keys() & direction.keys()
            )
        return products.detach()
