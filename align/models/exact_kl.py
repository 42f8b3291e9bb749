"""KL(policy || reference) of the next token, summed over the whole vocabulary: exact, never negative.

Given a sequence, the sum over its tokens of KL(policy(. | prefix) || reference(. | prefix)) needs no sampled token. For
sequences drawn from the policy its mean is an unbiased estimate of the KL divergence of whole responses, with less
variance than that of log policy(y) - log reference(y) (Amini et al., arXiv 2504.10637); along fixed responses it
measures how far the policy has moved there.

Legend: M scored positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.models.lm_head import TILE_LOGITS, LogitForm, chunk_rows

FEWEST_ROWS = 64


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """What the reference says at M positions: its last hidden states and its head."""

    states: Tensor
    """[M, D]."""
    head: nn.Module
    form: LogitForm


@torch.no_grad()
def exact_kl(
    states: Tensor, head: nn.Module, targets: Tensor, form: LogitForm, reference: ReferenceStates
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and KL(policy || reference) of the next token at M positions, [M] each, nats.

    The logits of a few positions at a time are in memory, of both models; two exponentials per logit are computed.

    Args:
        states: last hidden states [M, D] of the policy.
        head: its output embeddings.
        targets: token ids [M].
        form: how it makes logits from the head's output, at the temperature that is sampled at.
        reference: states and head of the reference at these positions.
    """
    size = _rows(head_rows(head), states.device)
    parts = [
        _logps_and_kl(
            form.apply(head(states[start : start + size])),
            reference.form.apply(reference.head(reference.states[start : start + size])),
            targets[start : start + size],
        )
        for start in range(0, max(len(states), 1), size)
    ]
    logps, kl = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return logps, kl


def _logps_and_kl(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """See ``exact_kl``; logits [m, V] of both models.

    KL = sum_v p(v) (l(v) - r(v)) - log Z + log Z_r, for logits l and r relative to their maxima. Tokens that only one
    of two vocabularies has, to pad it to a round number, are left out of the KL.
    """
    width = min(logits.shape[1], reference.shape[1])
    log_total = torch.logsumexp(logits, dim=1) if width < logits.shape[1] else None
    target = logits.gather(1, targets[:, None])[:, 0]
    top = logits[:, :width].amax(dim=1)
    ours = logits[:, :width] - top[:, None]
    theirs = reference[:, :width] - reference[:, :width].amax(dim=1, keepdim=True)
    apart = ours - theirs
    weights = ours.exp_()
    total, their_total = weights.sum(dim=1), theirs.exp_().sum(dim=1)
    mean = apart.mul_(weights).sum(dim=1) / total
    kl = (mean - total.log() + their_total.log()).clamp_min(0)
    return target - (top + total.log() if log_total is None else log_total), kl


def _rows(vocabulary: int, device: torch.device) -> int:
    """Positions per chunk: on a CPU few enough for its caches, many enough for its matrix products."""
    if device.type != "cpu":
        return chunk_rows(vocabulary, device)
    return max(FEWEST_ROWS, TILE_LOGITS["cpu"] // (2 * vocabulary))


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
    dtype = some.dtype if some.is_floating_point() else torch.float32  # quantized weights are integers
    if type(head) is nn.Linear:
        weight, bias = head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
    else:
        zero = head(torch.zeros(1, size, device=some.device, dtype=dtype))
        weight = (head(torch.eye(size, device=some.device, dtype=dtype)) - zero).T.contiguous()
        bias = zero[0].clone()
    made = nn.Linear(size, len(weight), bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
