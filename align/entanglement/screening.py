"""Screening without gradients: scores of a pair from one forward pass that hint at entanglement.

CHES (arXiv 2410.08847) compares sums of last hidden states, the inputs of the output head, at the positions that
predict response tokens. It is <gw, gl> - |gw|^2 of the head's own gradient with the inner products of the residuals
dropped, so it is a proxy; products.py has the exact numbers.

Legend: B pairs, T padded tokens, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.models.layout import base_model


class Screening(NamedTuple):
    """Scores of each pair, each [B], float64 on the CPU; higher means more similar responses."""

    ches: Tensor
    """<S_w, S_l> - |S_w|^2, S the sum of hidden states at the positions that predict a response."""
    ches_normalised: Tensor
    """<S_w, S_l> / (|y_w| |y_l|) - |S_w|^2 / |y_w|^2."""
    hidden_cosine: Tensor
    """Cosine of S_w and S_l."""


@torch.no_grad()
def screening_scores(model: nn.Module, batch: dict[str, Tensor]) -> Screening:
    """Scores of a right-padded batch in trl's layout; the padding mask leaves padding out of them.

    Args:
        model: causal language model, with its adapter if it has one.
        batch: ``input_ids``, ``attention_mask`` and ``completion_mask`` [2B, T], chosen rows first.
    """
    training = model.training
    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = base_model(model).base_model(**inputs, use_cache=False).last_hidden_state
    model.train(training)
    predicts = batch["completion_mask"][:, 1:].bool()
    states = hidden[:, :-1].to(torch.float64).masked_fill(~predicts[..., None], 0)
    chosen, rejected = states.sum(dim=1).cpu().chunk(2)
    length_w, length_l = predicts.sum(dim=1).cpu().clamp_min(1).chunk(2)
    inner, square = (chosen * rejected).sum(dim=1), (chosen * chosen).sum(dim=1)
    return Screening(
        ches=inner - square,
        ches_normalised=inner / (length_w * length_l) - square / length_w**2,
        hidden_cosine=torch.cosine_similarity(chosen, rejected, dim=1),
    )
