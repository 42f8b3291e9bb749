"""What a step on each training pair does to a held-out loss, to first order, split by its two responses.

With u the gradient of the held-out loss and d_w = -dL/dlogp_w, d_l = dL/dlogp_l the weights of the training loss, one
step of size eta on a pair alone moves the parameters by eta (d_w gw - d_l gl), and so the held-out loss by

    eta (d_w <gw, u> - d_l <gl, u>)

(TracIn, arXiv 2002.08484, for one pair). The first term came from the chosen response and the second from the rejected
one. Both inner products are directional derivatives, so one forward and one backward pass serve a whole batch of pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from align.data.held_out_pairs import WHOLE
from align.entanglement.conditions import loss_weights
from align.entanglement.directional import Direction, gradient_of
from align.entanglement.measure_pairs import PairMeasurement
from align.losses.pairwise import PairLogps
from align.models.logps import pair_logps

SGD, ADAMW = "influence", "adamw"
"""Kinds of influence: along the plain gradient of the held-out loss, and along that preconditioned as AdamW does."""
PARTS = ("", "_chosen", "_rejected")
"""Endings of the columns of an influence: the whole, what came from the chosen and what from the rejected response."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out loss of one group of pairs and its gradient."""

    name: str
    pairs: int
    loss: float
    """Mean over the pairs."""
    gradient: Direction
    """Of that mean, by the measured parameters that it depends on."""


def held_out(measure: PairMeasurement, rows: Dataset, groups: Sequence[str]) -> list[HeldOut]:
    """The held-out loss and its gradient for each group of pairs.

    Args:
        measure: of the model; its loss is the held-out loss.
        rows: held-out pairs, as ``tokenize_pairs`` returns them.
        groups: group of each row.
    """
    names = list(dict.fromkeys(groups))
    places = {name: [k for k, group in enumerate(groups) if group == name] for name in names}
    return [_of_group(measure, rows.select(places[name]), name) for name in names]


def _of_group(measure: PairMeasurement, rows: Dataset, name: str) -> HeldOut:
    measured = measure.products.measured
    total: dict[str, Tensor] = {}
    loss = 0.0
    for _, batch, margin in measure.batches(rows):
        value = held_out_losses(measure, batch, margin).sum()
        loss += float(value.detach())
        for key, grad in gradient_of(value, measured).items():
            total[key] = total[key] + grad if key in total else grad.clone()
    return HeldOut(name, len(rows), loss / len(rows), {key: grad / len(rows) for key, grad in total.items()})


def held_out_losses(measure: PairMeasurement, batch: dict[str, Tensor], margin: Tensor | None) -> Tensor:
    """The loss [B] of a batch of pairs, with a graph to the parameters where gradients are enabled.

    A model that is its own reference is that only now: its log-probs as they are stay the reference when it moves.
    """
    model = measure.products.model
    reference = measure.reference_logps(batch)
    training = model.training
    model.eval()
    logps = pair_logps(model, batch, "concatenated")
    model.train(training)
    own = (logps.chosen.detach(), logps.rejected.detach())
    ref_chosen, ref_rejected = own if reference is None else (one.to(logps.chosen) for one in reference)
    pairs = PairLogps(logps.chosen, logps.rejected, ref_chosen, ref_rejected, *logps[2:4])
    return measure.loss(pairs, None if margin is None else margin.to(logps.chosen))


@dataclass(frozen=True, slots=True)
class InfluenceMeasurement:
    """Measures tokenized training pairs along directions; one row per pair, in their order.

    For each direction it gives three columns (``column``): the first-order change of the held-out loss by a step on the
    pair alone, per unit of learning rate, and its two parts. Negative: the step lowers the held-out loss.
    """

    measure: PairMeasurement
    """Of the model; its loss is the training loss."""
    directions: Mapping[tuple[str, str], Direction]
    """(kind, held-out group) -> gradient of the group's loss, or that gradient preconditioned."""

    def __call__(self, rows: Dataset) -> Dataset:
        """Measure rows of ``tokenize_pairs``, with ``margin`` where the training loss needs one."""
        columns: dict[str, np.ndarray] = {}
        for index, batch, margin in self.measure.batches(rows):
            for name, values in self._columns(batch, margin).items():
                columns.setdefault(name, np.zeros(len(rows)))[index] = values.numpy()
        return Dataset.from_dict({"id": rows["id"], **columns})

    def _columns(self, batch: dict[str, Tensor], margin: Tensor | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (kind, group), direction in self.directions.items():
            products = self.measure.products(batch, direction, squares=False)
            if not found:
                reference = self.measure.reference_logps(batch) or (products.chosen_logps, products.rejected_logps)
                d_w, d_l = loss_weights(self.measure.loss, products.with_reference(*reference), margin)
                found = {"d_w": d_w, "d_l": d_l}
            chosen, rejected = d_w * products.chosen_jvp, -d_l * products.rejected_jvp
            for part, values in zip(PARTS, (chosen + rejected, chosen, rejected), strict=True):
                found[column(kind, part, group)] = values
        return found


def column(kind: str, part: str, group: str = WHOLE) -> str:
    """Name of the column of one kind (``SGD``, ``ADAMW``), one of ``PARTS``, and one held-out group."""
    return kind + part if group == WHOLE else f"{kind}{part}@{group}"


def directions_of(groups: Sequence[HeldOut], state: "AdamState | None") -> dict[tuple[str, str], Direction]:
    """The directions to measure along: each group's gradient, and with a state each of them preconditioned."""
    found: dict[tuple[str, str], Direction] = {(SGD, group.name): group.gradient for group in groups}
    if state is not None:
        found |= {(ADAMW, group.name): state.precondition(group.gradient) for group in groups}
    return found


def with_whole(table: Dataset, sizes: Mapping[str, int]) -> Dataset:
    """Add the columns of the loss over all held-out pairs: influence is linear in u, so they need no pass.

    Args:
        table: columns of ``InfluenceMeasurement``.
        sizes: held-out group -> its number of pairs.
    """
    total = sum(sizes.values())
    for kind in (SGD, ADAMW):
        for part in PARTS:
            parts = {name: column(kind, part, name) for name in sizes}
            if kind + part in table.column_names or not set(parts.values()) <= set(table.column_names):
                continue
            values = [sizes[name] / total * np.asarray(table[parts[name]]) for name in sizes]
            table = table.add_column(kind + part, np.sum(values, axis=0))
    return table


FLOOR = 0.03
"""Least square root of a second moment, as a share of its root mean square over the parameter: see ``AdamState``."""


@dataclass(frozen=True, slots=True)
class AdamState:
    """The moments of an Adam optimizer.

    A coordinate that training has hardly moved (the row of a token that it never saw) has a second moment near 0, and
    would outweigh all others, while a real step there is bounded, since the pair's own gradient enters the moment. The
    square root of a moment is therefore raised to ``FLOOR`` times its root mean square over the parameter. Coordinates
    that are honestly so small give next to nothing either way: their gradients are as small.
    """

    first: Mapping[str, Tensor]
    """Parameter -> exp_avg."""
    second: Mapping[str, Tensor]
    """Parameter -> exp_avg_sq."""
    step: float
    betas: tuple[float, float]
    eps: float

    def precondition(self, gradient: Direction) -> dict[str, Tensor]:
        """The gradient divided by the root of the second moments, as a step of Adam divides its own.

        An inner product with it is what a pair's gradient changes over the steps in which momentum carries it; a
        coordinate that no training step ever had a gradient for does not count.
        """
        correction = 1 - self.betas[1] ** self.step
        found = {}
        for name, value in gradient.items():
            root = (self.second[name].to(value) / correction).sqrt()
            floor = FLOOR * root.square().mean().sqrt()
            scaled = value / (root.clamp_min(floor) + self.eps)
            found[name] = torch.where(floor > 0, scaled, torch.zeros_like(value))
        return found

    @property
    def first_share(self) -> float:
        """Share of a gradient's effect that the very step has which computes it; momentum carries the rest later."""
        return (1 - self.betas[0]) / (1 - self.betas[0] ** (self.step + 1))
