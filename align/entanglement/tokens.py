"""Which tokens carry the entanglement: each token's inner product with the other response's gradient."""

import torch
from torch import Tensor, nn

from align.entanglement.predict import directional_logps
from align.training.layout import base_model
from align.training.logps import add_completion_head, pair_logps


def token_products(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inner products [T - 1] of every chosen token with gl, and of every rejected token with gw, for one pair.

    The first sum to <gw, gl>, and so do the second. One backward and one forward-mode pass per response.

    Args:
        model: causal language model; its trained parameters are measured.
        batch: one pair in trl's layout.

    Returns:
        Values at place t - 1 for the token at place t; 0 where a token carries no loss.
    """
    add_completion_head(base_model(model))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = model.training
    model.eval()
    logps = pair_logps(model, batch, "concatenated")
    found = []
    for row, other in ((0, logps.rejected), (1, logps.chosen)):
        gradient = torch.autograd.grad(other.sum(), list(trained.values()), retain_graph=True, allow_unused=True)
        direction = {name: g for name, g in zip(trained, gradient, strict=True) if g is not None}
        found.append(directional_logps(model, batch, direction)[1][row])
    model.train(training)
    return found[0], found[1]
