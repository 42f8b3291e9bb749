"""KL(policy || reference) of the next token, summed over the whole vocabulary: exact, never negative.

Given a sequence, the sum over its tokens of KL(policy(. | prefix) || reference(. | prefix)) needs no sampled token. For
sequences drawn from the policy its mean is an unbiased estimate of the KL divergence of whole responses, with less
variance than that of log policy(y) - log reference(y) (Amini et al., arXiv 2504.10637); along fixed responses it
measures how far the policy has moved there.

Legend: M scored positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.models.lm_head import LogitForm, chunk_rows


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """What the reference says at M positions: its last hidden states and its head."""

    states: Tensor
    """[M, D]."""
    head: nn.Module
    form: LogitForm


@torch.no_grad()
def exact_kl(states: Tensor, head: nn.Module, form: LogitForm, reference: ReferenceStates) -> Tensor:
    """KL(policy || reference) of the next token at M positions, nats, [M], at least 0.

    Args:
        states: last hidden states [M, D] of the policy.
        head: its output embeddings.
        form: how it makes logits from the head's output, at the temperature that is sampled at.
        reference: the same of the reference at these positions.
    """
    size = chunk_rows(head_rows(head), states.device)
    parts = [
        _kl(
            form.apply(head(states[start : start + size])),
            reference.form.apply(reference.head(reference.states[start : start + size])),
        )
        for start in range(0, max(len(states), 1), size)
    ]
    return torch.cat(parts)


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    width = min(logits.shape[1], reference.shape[1])  # one of them may be padded to a round number of rows
    logps = F.log_softmax(logits[:, :width], dim=-1)
    apart = logps - F.log_softmax(reference[:, :width], dim=-1)
    return (logps.exp() * apart).sum(dim=-1).clamp_min(0)


def head_rows(head: nn.Module) -> int:
    """Tokens of the vocabulary that a head has logits for, at most."""
    return max(parameter.shape[0] for parameter in head.parameters())


@torch.no_grad()
def frozen_head(head: nn.Module, size: int) -> nn.Linear:
    """A copy of a head as it is now, whatever adapters or wrappers it has: a head is linear in the hidden state.

    Args:
        head: output embeddings.
        size: D.
    """
    some = next(head.parameters())
    if type(head) is nn.Linear:
        weight, bias = head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
    else:
        zero = head(torch.zeros(1, size, device=some.device, dtype=some.dtype))
        weight = (head(torch.eye(size, device=some.device, dtype=some.dtype)) - zero).T.contiguous()
        bias = zero[0].clone()
    made = nn.Linear(size, len(weight), bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
