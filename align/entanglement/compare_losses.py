"""What every loss would do to the same measured pairs: one measurement, then arithmetic for each loss.

A gradient step of size eta on one pair changes its chosen log-prob by eta (d_w |gw|^2 - d_l <gw, gl>) to first order
(align/entanglement/conditions.py). The three products do not depend on the loss, d_w and d_l are its derivatives.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from align.data.statistics import missing_values
from align.entanglement.conditions import NOISE, changes
from align.losses.pairwise import PairLogps, gradient_weights
from align.losses.spec import BoundLoss
from align.stats import share_interval

MOST = 0.95
"""Share of the pairs that the smaller of the two NLL weights keeps up."""


@dataclass(frozen=True, slots=True)
class Incentive:
    """What a step of one loss does to each pair, over N pairs."""

    loss: str
    d_w: float
    """Median of -dL/dlogp_w: above 0 the loss itself pushes the chosen response up."""
    d_l: float
    """Median of dL/dlogp_l: above 0 the loss itself pushes the rejected response down."""
    falls: dict[str, Any]
    """Share of the pairs whose chosen response a step on the pair lowers, with its interval."""
    rejected_rises: float
    """Share of the pairs whose rejected response a step on the pair raises."""
    nll_for_most: float
    """Smallest weight of an nll term under which a step lowers the chosen response of at most 5% of the pairs."""
    nll_for_all: float
    """Smallest weight of an nll term under which a step lowers no chosen response."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare_losses(
    table: Dataset, losses: Iterable[BoundLoss], *, noise: float = NOISE[torch.float32]
) -> tuple[list[Incentive], dict[str, str]]:
    """Compute the incentives of each loss on measured pairs, the loss that lowers fewest chosen responses first.

    Args:
        table: rows of ``measure_pairs``, with ``margin`` where a loss needs one. A loss that compares pairs sees all of
            them as the first step of a training.
        losses: losses with their parameters; sums too.
        noise: relative error of the products (``products_noise``); a smaller change is none.

    Returns:
        The incentives, and name of a loss -> why it was left out.
    """
    found, left_out = [], {}
    columns = {name: _column(table, name) for name in ("chosen_sq", "rejected_sq", "inner")}
    margins = "margin" in table.column_names and not len(missing_values(table, "margin"))
    for loss in losses:
        if loss.spec.unpaired:
            left_out[loss.spec.name] = "is a loss of single responses"
        elif loss.spec.tokens != "none":
            left_out[loss.spec.name] = "reads tokens, of which the measurement keeps the sums"
        elif loss.spec.needs_margin and not margins:
            left_out[loss.spec.name] = "needs a margin of every pair"
        else:
            found.append(_incentive(loss, table, columns, noise))
    return sorted(found, key=lambda item: (item.falls["value"], item.loss)), left_out


def nll_weight(d_w: Tensor, d_l: Tensor, chosen_sq: Tensor, inner: Tensor, length: Tensor) -> Tensor:
    """Smallest weight of an nll term under which a step on a pair does not lower its chosen response, each [N].

    The term adds weight / |y_w| to d_w, so the change is 0 at |y_w| (d_l <gw, gl> / |gw|^2 - d_w).
    """
    return (length * (d_l * inner / chosen_sq - d_w)).clamp_min(0)


def _incentive(loss: BoundLoss, table: Dataset, columns: dict[str, Tensor], noise: float) -> Incentive:
    d_w, d_l = loss_weights_of(loss, table)
    step = changes(columns["chosen_sq"], columns["rejected_sq"], columns["inner"], d_w, d_l, noise=noise)
    falls = step.chosen < -step.noise_chosen
    needed = nll_weight(d_w, d_l, columns["chosen_sq"], columns["inner"], _column(table, "tokens_chosen"))
    return Incentive(
        loss=loss.spec.name,
        d_w=float(d_w.median()),
        d_l=float(d_l.median()),
        falls=share_interval(falls.numpy()).to_dict(),
        rejected_rises=float((step.rejected > step.noise_rejected).double().mean()),
        nll_for_most=float(np.quantile(needed.numpy(), MOST, method="higher")),
        nll_for_all=float(needed.max()),
    )


def loss_weights_of(loss: BoundLoss, table: Dataset) -> tuple[Tensor, Tensor]:
    """d_w and d_l [N] of a loss at the measured log-probs; one that compares pairs sees all of them."""
    chosen, rejected = (_column(table, f"logp_{side}") for side in ("chosen", "rejected"))
    logps = PairLogps(
        chosen.requires_grad_(),
        rejected.requires_grad_(),
        chosen.detach() - _column(table, "logp_chosen_change"),
        rejected.detach() - _column(table, "logp_rejected_change"),
        _column(table, "tokens_chosen"),
        _column(table, "tokens_rejected"),
    )
    statistics = {}
    for part in loss.parts:
        if part.spec.statistics is not None:
            statistic = part.spec.statistics(part.parameters, 0)
            statistics[part.spec.name], _ = statistic(statistic.columns(logps).detach(), 0, update=False)
    margin = _column(table, "margin") if loss.spec.needs_margin else None
    with torch.enable_grad():
        return gradient_weights(loss(logps, margin, statistics=statistics), logps)


def _column(table: Dataset, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(table[name], dtype=np.float64).copy())
