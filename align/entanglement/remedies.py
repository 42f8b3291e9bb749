"""Remedies: how much of a pair's chosen and rejected gradient a step takes, given what the gradients are. Pure.

A remedy multiplies d_w by a_w and d_l by a_l and leaves the value of the loss as it is. With |gw|^2, |gl|^2, <gw, gl>
of a pair, a plain gradient step on it then changes its chosen log-prob by a_w d_w |gw|^2 - a_l d_l <gw, gl>
(conditions.py). The geometry is that of plain gradient steps; an adaptive optimizer's differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Mean = Callable[[Tensor], Tensor]


def hold_chosen(chosen_sq: Tensor, inner: Tensor, d_w: Tensor, d_l: Tensor, *, keep: float) -> tuple[Tensor, Tensor]:
    """Take just so little of the rejected gradient that the chosen response keeps a share of its own rise.

    a_w = 1, and a_l <= 1 is the largest factor for which the predicted change of the chosen log-prob is at least
    ``keep`` times what its own gradient gives, d_w |gw|^2. Pairs that meet this are left alone, and so are pairs whose
    d_w is not positive (their loss does not ask the chosen response to rise). New here.

    Args:
        chosen_sq: |gw|^2 [B].
        inner: <gw, gl> [B].
        d_w: [B].
        d_l: [B].
        keep: in [0, 1); 0 is "predicted not to fall".
    """
    pull, own = d_l * inner, (1 - keep) * d_w * chosen_sq
    binding = (d_w > 0) & (pull > own)
    factor = torch.where(binding, own / torch.where(binding, pull, torch.ones_like(pull)), torch.ones_like(pull))
    return torch.ones_like(factor), factor


def normalise(chosen_sq: Tensor, rejected_sq: Tensor, d_w: Tensor, d_l: Tensor) -> tuple[Tensor, Tensor]:
    """Give both gradients of a pair the same length: a_w d_w |gw| = a_l d_l |gl|, the product d_w d_l kept.

    For d_w = d_l the direction is that of pairwise-normalised descent, gw/|gw| - gl/|gl| (arXiv 2410.13828, section on
    remedies), with the loss's own weight and the geometric mean of the lengths; it is also the per-pair form of reward
    calibration (arXiv 2604.18239), whose ratio d_w/d_l it moves to |gl|/|gw|. Every pair with cosine below 1 is then
    separated. Pairs in which d_w, d_l or a gradient is not positive are left alone.
    """
    usable = (d_w > 0) & (d_l > 0) & (chosen_sq > 0) & (rejected_sq > 0)
    one = torch.ones_like(d_w)
    ratio = torch.where(usable, d_w / torch.where(usable, d_l, one), one)
    target = torch.where(usable, (rejected_sq / torch.where(usable, chosen_sq, one)).sqrt(), one)
    factor = (target / ratio).sqrt()
    return factor, 1 / factor


@dataclass(frozen=True, slots=True)
class BandState:
    """Running logarithms of reward calibration."""

    d_w: float
    """Of the mean d_w."""
    d_l: float
    """Of the mean d_l."""
    chosen: float
    """Of the length of the gradient of the mean chosen log-prob."""
    rejected: float
    """Of the length of the gradient of the mean rejected log-prob."""


def calibrate(
    gram: Tensor, d_w: Tensor, d_l: Tensor, state: BandState | None, *, decay: float, mean: Mean
) -> tuple[Tensor, Tensor, BandState | None]:
    """Reward calibration of the disentanglement band (arXiv 2604.18239, as its authors' code computes it).

    One factor for the whole batch, a_w = a and a_l = 1/a with log a = (log r* - log r)/2, where r = mean d_w / mean d_l
    and r* = |s_l| / |s_w|, s the gradient of the batch's mean log-prob; each of the four logarithms is a running
    average that starts at its first value. Here they run over all processes, so that every process takes the same
    factor, and a batch in which one of the four is not positive leaves them as they are.

    Args:
        gram: inner products [2B, 2B] of this process' gradients, chosen first.
        d_w: [B].
        d_l: [B].
        state: averages before the batch; None before the first.
        decay: of the running averages.
        mean: average of a tensor over processes.
    """
    pairs = len(d_w)
    squares = torch.stack([gram[:pairs, :pairs].mean(), gram[pairs:, pairs:].mean()])
    found = mean(torch.cat([torch.stack([d_w.mean(), d_l.mean()]), squares.clamp_min(0).sqrt()]))
    if bool((found > 0).all()):
        new = found.log().tolist()
        old = new if state is None else [state.d_w, state.d_l, state.chosen, state.rejected]
        state = BandState(*(decay * before + (1 - decay) * now for before, now in zip(old, new, strict=True)))
    delta = 0.0 if state is None else (state.rejected - state.chosen) - (state.d_w - state.d_l)
    factor = torch.full_like(d_w, math.exp(delta / 2))
    return factor, 1 / factor, state
