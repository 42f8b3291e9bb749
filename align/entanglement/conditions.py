"""Pure functions from gradient products to what a step of the loss does to a pair (arXiv 2410.13828, corrected).

With lw, ll the log-probs of chosen and rejected, d_w = -dL/dlw and d_l = dL/dll, one gradient-descent step of size eta
on that pair alone changes, to first order,

    lw by eta (d_w |gw|^2 - d_l <gw, gl>),    ll by eta (d_w <gw, gl> - d_l |gl|^2).

d_w and d_l may be 0 or negative (IPO past its target, label smoothing), so the signs of the two changes are tested and
nothing is divided by them. A weight on the pair scales both changes by the same factor, so it never changes a verdict.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.models.layout import base_model

Verdict = Literal["separated", "both fall", "both rise", "reversed", "no signal", "undecided"]
FALLS = ("both fall", "reversed")
"""Verdicts under which a step would lower the chosen response."""
RISES = ("both rise", "reversed")
"""Verdicts under which a step would raise the rejected response."""
ENTANGLED = frozenset({*FALLS, *RISES})
"""Verdicts of an entangled pair: one step on it alone would lower its chosen response or raise its rejected one."""
NOISE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative error of gradient products by the dtype that the model computes in, several times what was seen
(docs/entanglement.md); a change smaller than this share of its terms is not decided."""


@dataclass(frozen=True, slots=True)
class Changes:
    """First-order changes of one pair's log-probs per unit of step size, each [B], float64."""

    chosen: Tensor
    rejected: Tensor
    noise_chosen: Tensor
    """Numerical noise: a smaller change has no reliable sign."""
    noise_rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """Change of log p(chosen) - log p(rejected)."""
        return self.chosen - self.rejected

    def verdicts(self) -> list[Verdict]:
        """The verdict of each pair: ``separated`` (chosen rises, rejected falls), ``both fall``, ``both rise``,
        ``reversed``, ``no signal`` (the loss has no gradient), ``undecided`` (a sign is within numerical noise)."""
        names: list[Verdict] = []
        for up, down, noise_up, noise_down in zip(
            self.chosen.tolist(), self.rejected.tolist(), self.noise_chosen.tolist(), self.noise_rejected.tolist(),
            strict=True,
        ):  # fmt: skip
            if noise_up == 0 and noise_down == 0:
                names.append("no signal")
            elif not (abs(up) > noise_up and abs(down) > noise_down):  # nor is one that is not a number
                names.append("undecided")
            elif up > 0:
                names.append("separated" if down < 0 else "both rise")
            else:
                names.append("both fall" if down < 0 else "reversed")
        return names


def loss_weights(
    loss: BoundLoss,
    logps: PairLogps,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    trust: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiate the loss: d_w = -dL/dlw and d_l = dL/dll, each [B], float64.

    Args:
        loss: any loss of the log-probs of one pair (``from_logps``).
        logps: log-probs of the pairs, [B].
        margin: [B], for losses that use one.
        weight: [B], weight of each pair; None: 1.
        trust: [B], trust in the margin of each pair; None: the loss's parameter.
    """
    chosen, rejected = (values.double().detach().requires_grad_() for values in (logps.chosen, logps.rejected))
    inner = PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=logps.ref_chosen.double(),
        ref_rejected=logps.ref_rejected.double(),
        chosen_length=logps.chosen_length,
        rejected_length=logps.rejected_length,
    )
    with torch.enable_grad():
        total = loss(inner, *(None if values is None else values.double() for values in (margin, trust)))
        total = (total if weight is None else total * weight.double()).sum()
        to_chosen, to_rejected = torch.autograd.grad(total, [chosen, rejected], materialize_grads=True)
    return -to_chosen, to_rejected


def products_noise(model: nn.Module) -> float:
    """The relative error to expect of a model's gradient products: that of the least precise dtype in it.

    A quantized base computes in 16 bits, whatever the dtype of its other parts.
    """
    base = base_model(model)
    dtypes = {parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
    if getattr(base, "is_quantized", False):
        dtypes.add(torch.bfloat16)
    return max(NOISE.get(dtype, NOISE[torch.bfloat16]) for dtype in dtypes)


def changes(
    chosen_sq: Tensor, rejected_sq: Tensor, inner: Tensor, d_w: Tensor, d_l: Tensor, *, noise: float
) -> Changes:
    """First-order changes of each pair by a gradient step on it alone; all arguments [B].

    Args:
        chosen_sq: |gw|^2.
        rejected_sq: |gl|^2.
        inner: <gw, gl>.
        d_w: weight of the chosen gradient.
        d_l: weight of the rejected gradient.
        noise: relative error of the products (``products_noise``).
    """
    size = (chosen_sq * rejected_sq).sqrt()
    return Changes(
        chosen=d_w * chosen_sq - d_l * inner,
        rejected=d_w * inner - d_l * rejected_sq,
        noise_chosen=noise * (d_w.abs() * chosen_sq + d_l.abs() * size),
        noise_rejected=noise * (d_w.abs() * size + d_l.abs() * rejected_sq),
    )


def slack(chosen_sq: Tensor, rejected_sq: Tensor, inner: Tensor, d_w: Tensor, d_l: Tensor) -> Tensor:
    """Distance of each pair from entanglement, in log units [B]; negative: entangled.

    It is -log cos - |log((d_w / d_l) / (|gl| / |gw|))|: inf for a cosine that is not positive (never entangled), NaN
    unless d_w and d_l are both positive.
    """
    cosine = inner / (chosen_sq * rejected_sq).sqrt()
    off_center = (d_w / d_l).log() - 0.5 * (rejected_sq / chosen_sq).log()
    found = -cosine.clamp_min(0).log() - off_center.abs()
    return torch.where((d_w > 0) & (d_l > 0), found, torch.nan)


def shares(verdicts: list[Verdict]) -> dict[str, float]:
    """Share of each verdict."""
    return {name: verdicts.count(name) / max(len(verdicts), 1) for name in get_args(Verdict)}
