"""Remedies: pure functions from gradient products to factors of the chosen and the rejected gradient of a pair.

A remedy multiplies d_w by a_w and d_l by a_l and leaves the value of the loss as it is. With |gw|^2, |gl|^2, <gw, gl>
of a pair, a plain gradient step on it then changes its chosen log-prob by a_w d_w |gw|^2 - a_l d_l <gw, gl>
(conditions.py). The geometry is that of plain gradient steps; an adaptive optimizer's differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linprog
from torch import Tensor

Mean = Callable[[Tensor], Tensor]


def hold_chosen(chosen_sq: Tensor, inner: Tensor, d_w: Tensor, d_l: Tensor, *, keep: float) -> tuple[Tensor, Tensor]:
    """Scale the rejected gradient down until the chosen response keeps a share of its own rise.

    a_w = 1, and a_l <= 1 is the largest factor for which the predicted change of the chosen log-prob is at least
    ``keep`` times that of its own gradient, d_w |gw|^2. Pairs that meet this are unchanged, and so are pairs whose d_w
    is not positive (their loss does not ask the chosen response to rise). New here.

    Args:
        chosen_sq: |gw|^2 [B].
        inner: <gw, gl> [B].
        d_w: [B].
        d_l: [B].
        keep: in [0, 1); 0 is "predicted not to fall".
    """
    pull, room = d_l * inner, (1 - keep) * d_w * chosen_sq
    binding = (d_w > 0) & (pull > room)
    factor = torch.where(binding, room / torch.where(binding, pull, torch.ones_like(pull)), torch.ones_like(pull))
    return torch.ones_like(factor), factor


def hold_batch(gram: Tensor, d_w: Tensor, d_l: Tensor, *, keep: float) -> tuple[Tensor, Tensor]:
    """Do ``hold_chosen`` for the step on the mean loss of a batch, in which other pairs pull too.

    a_w = 1, and a_l in [0, 1] has the largest sum for which the predicted change of every chosen log-prob is at least
    ``keep`` times the change by the chosen gradients of the batch (or that change itself, if it is negative). This is a
    linear program in B unknowns; every factor is 1 if ones satisfy it. New here.

    Args:
        gram: inner products [2B, 2B] of the batch's gradients, chosen first.
        d_w: [B].
        d_l: [B].
        keep: in [0, 1).
    """
    pairs = len(d_w)
    by_chosen = gram[:pairs, :pairs] @ d_w
    pull = gram[:pairs, pairs:] * d_l
    one = torch.ones_like(d_w)
    scale = (gram.diagonal()[:pairs] * d_w.abs().max()).clamp_min(torch.finfo(gram.dtype).tiny)
    room = (1 - keep) * by_chosen.clamp_min(0)
    if bool((pull @ one <= room).all()):
        return one, one
    solution = linprog(
        -one.numpy(), A_ub=(pull / scale[:, None]).numpy(), b_ub=(room / scale).numpy(), bounds=(0, 1), method="highs"
    )
    return one, torch.from_numpy(solution.x).to(one) if solution.success else torch.zeros_like(one)


def normalise(chosen_sq: Tensor, rejected_sq: Tensor, d_w: Tensor, d_l: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize both gradients of a pair to the same length: a_w d_w |gw| = a_l d_l |gl|, with a_w a_l = 1.

    For d_w = d_l the direction is that of pairwise normalized gradient descent, gw/|gw| - gl/|gl| (arXiv 2410.13828,
    section on remedies), with the loss's own weight and the geometric mean of the lengths; it is also the per-pair form
    of reward calibration (arXiv 2604.18239), whose ratio d_w/d_l it moves to |gl|/|gw|. Every pair with cosine below 1
    is then separated. Pairs in which d_w, d_l or a norm is not positive are unchanged.
    """
    usable = (d_w > 0) & (d_l > 0) & (chosen_sq > 0) & (rejected_sq > 0)
    one = torch.ones_like(d_w)
    ratio = torch.where(usable, d_w / torch.where(usable, d_l, one), one)
    target = torch.where(usable, (rejected_sq / torch.where(usable, chosen_sq, one)).sqrt(), one)
    factor = (target / ratio).sqrt()
    return factor, 1 / factor


@dataclass(frozen=True, slots=True)
class BandState:
    """Running averages of four logarithms in reward calibration."""

    d_w: float
    """Log of the mean d_w."""
    d_l: float
    """Log of the mean d_l."""
    chosen: float
    """Log of the norm of the gradient of the mean chosen log-prob."""
    rejected: float
    """Log of the norm of the gradient of the mean rejected log-prob."""


def calibrate(
    gram: Tensor, d_w: Tensor, d_l: Tensor, state: BandState | None, *, decay: float, mean: Mean
) -> tuple[Tensor, Tensor, BandState | None]:
    """Calibrate rewards to the disentanglement band (arXiv 2604.18239, as its authors' code computes it).

    One factor for the whole batch, a_w = a and a_l = 1/a with log a = (log r* - log r)/2, where r = mean d_w / mean d_l
    and r* = |s_l| / |s_w|, s the gradient of the batch's mean log-prob; each of the four logarithms is a running
    average that starts at its first value. Here they run over all processes, so that every process uses the same
    factor, and a batch in which one of the four is not positive leaves them unchanged.

    Args:
        gram: inner products [2B, 2B] of this process' gradients, chosen first.
        d_w: [B].
        d_l: [B].
        state: averages before the batch; None before the first.
        decay: decay of the running averages.
        mean: averages a tensor over processes.
    """
    pairs = len(d_w)
    squares = torch.stack([gram[:pairs, :pairs].mean(), gram[pairs:, pairs:].mean()])
    averages = mean(torch.cat([torch.stack([d_w.mean(), d_l.mean()]), squares.clamp_min(0).sqrt()]))
    if bool((averages > 0).all()):
        new = averages.log().tolist()
        old = new if state is None else [state.d_w, state.d_l, state.chosen, state.rejected]
        state = BandState(*(decay * before + (1 - decay) * now for before, now in zip(old, new, strict=True)))
    delta = 0.0 if state is None else (state.rejected - state.chosen) - (state.d_w - state.d_l)
    factor = torch.full_like(d_w, math.exp(delta / 2))
    return factor, 1 / factor, state
