"""The products of a batch of pairs, and batches in trl's layout taken apart and put together."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from align.losses.pairwise import PairLogps


@dataclass(frozen=True, slots=True)
class PairProducts:
    """Inner products of the gradients of each pair, each [B], float64 on the CPU."""

    chosen_sq: Tensor
    """|gw|^2."""
    rejected_sq: Tensor
    """|gl|^2."""
    inner: Tensor
    """<gw, gl>."""
    chosen_logps: Tensor
    """nats."""
    rejected_logps: Tensor
    """nats."""
    chosen_length: Tensor
    """Scored tokens."""
    rejected_length: Tensor
    """Scored tokens."""
    chosen_jvp: Tensor
    """Directional derivative <gw, u> along the direction that was given; NaN without a direction."""
    rejected_jvp: Tensor
    """<gl, u>."""

    @property
    def cosine(self) -> Tensor:
        """<gw, gl> / (|gw| |gl|); 0 where a gradient vanishes."""
        norms = (self.chosen_sq * self.rejected_sq).sqrt()
        return torch.where(norms > 0, self.inner / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    @property
    def norm_ratio(self) -> Tensor:
        """|gl| / |gw|; inf where the chosen gradient vanishes."""
        return (self.rejected_sq / self.chosen_sq).sqrt()

    def with_reference(self, ref_chosen: Tensor, ref_rejected: Tensor) -> PairLogps:
        """The log-probs as a loss takes them, with those of the reference [B]."""
        return PairLogps(
            self.chosen_logps, self.rejected_logps, ref_chosen, ref_rejected, self.chosen_length, self.rejected_length
        )


def select_pairs(batch: dict[str, Tensor], pairs: Sequence[int]) -> dict[str, Tensor]:
    """Some pairs of a batch in trl's layout, without the columns that are padding in all of them."""
    half = batch["input_ids"].shape[0] // 2
    rows = torch.tensor([*pairs, *(half + k for k in pairs)], device=batch["input_ids"].device)
    width = int(batch["attention_mask"][rows].sum(dim=1).max())
    return {name: value[rows, :width] for name, value in batch.items()}


def concatenate(parts: list[PairProducts]) -> PairProducts:
    return PairProducts(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(PairProducts)))


def pair_products(totals: Tensor, logps: Tensor, jvp: Tensor, batch: dict[str, Tensor]) -> PairProducts:
    """Split |gw|^2, |gl|^2, <gw, gl> [3, B], log-probs [2B] and directional derivatives [2B] into columns."""
    length = batch["completion_mask"][:, 1:].sum(dim=1)
    columns = (logps.cpu(), length.cpu(), jvp.cpu())
    return PairProducts(*totals, *(part for column in columns for part in column.chunk(2)))
