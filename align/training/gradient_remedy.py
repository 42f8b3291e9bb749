"""A remedy against gradient entanglement during training: each batch is measured before its step."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from align.config import RemedySection
from align.config.columns import PAIR_COLUMNS
from align.entanglement.conditions import loss_weights
from align.entanglement.products import GradientProducts
from align.entanglement.remedies import BandState, calibrate, hold_batch, hold_chosen, normalise
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.models.collator import REAL, counted
from align.models.layout import trim

GRADIENT_INPUTS = ("input_ids", "attention_mask", "completion_mask")


class GradientRemedy:
    """Computes factors for the chosen and the rejected gradient of each pair (align/entanglement/remedies.py).

    Each batch costs one more forward pass and one backward pass through the activations.

    Args:
        model: the policy, not wrapped by a launcher.
        loss: the loss of the training, of the log-probs of one pair.
        config: kind and parameters of the remedy.
        accelerator: averages over processes.
    """

    def __init__(self, model: nn.Module, loss: BoundLoss, config: RemedySection, accelerator: Accelerator) -> None:
        self.measure = GradientProducts(model, config.parameters)
        self.loss = loss
        self.config = config
        self.accelerator = accelerator
        self.band: BandState | None = None

    @property
    def coupled(self) -> bool:
        """Whether a factor depends on the other pairs of the batch, which then must not be split."""
        return self.config.kind in ("hold_batch", "calibrate")

    def factors(self, inputs: dict[str, Any], ref_chosen: Tensor, ref_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the factors a_w and a_l, each [B], float32 on the device of ``inputs``, at the current parameters.

        Duplicates that only fill the batch (``REAL``) are not measured; their factors are 1.

        Args:
            inputs: a batch as ``PairCollator`` makes it.
            ref_chosen: reference log-probs [B].
            ref_rejected: reference log-probs [B].
        """
        real = inputs.get(REAL)
        if real is None or real.all() or not real.any():
            return self._measure(inputs, ref_chosen, ref_rejected)
        rows = real.nonzero().flatten()
        a_w, a_l = self._measure(trim(inputs, rows), ref_chosen[rows], ref_rejected[rows])
        ones = torch.ones_like(ref_chosen)
        return ones.index_copy(0, rows, a_w), ones.index_copy(0, rows, a_l)

    def _measure(self, inputs: dict[str, Any], ref_chosen: Tensor, ref_rejected: Tensor) -> tuple[Tensor, Tensor]:
        batch = {name: inputs[name] for name in GRADIENT_INPUTS}
        gram = None
        if self.coupled:
            gram, products = self.measure.gram_and_pairs(batch)
        else:
            products = self.measure(batch)
        logps = PairLogps(
            products.chosen_logps,
            products.rejected_logps,
            ref_chosen.double().cpu(),
            ref_rejected.double().cpu(),
            products.chosen_length,
            products.rejected_length,
        )
        columns = {name: inputs[name].cpu() for name in PAIR_COLUMNS if name in inputs}
        d_w, d_l = loss_weights(self.loss, logps, **columns)
        if gram is None and self.config.kind == "hold_chosen":
            factors = hold_chosen(products.chosen_sq, products.inner, d_w, d_l, keep=self.config.keep)
        elif gram is None:
            factors = normalise(products.chosen_sq, products.rejected_sq, d_w, d_l)
        elif self.config.kind == "hold_batch":
            factors = hold_batch(gram, d_w, d_l, keep=self.config.keep)
        else:
            mean = partial(self._mean, pairs=counted(inputs))
            *factors, self.band = calibrate(gram, d_w, d_l, self.band, decay=self.config.decay, mean=mean)  # type: ignore[assignment]
        device = ref_chosen.device
        return factors[0].float().to(device), factors[1].float().to(device)

    def _mean(self, values: Tensor, *, pairs: int) -> Tensor:
        """Mean over processes, each weighted by its number of real pairs; a process with duplicates alone has none."""
        local = torch.cat([pairs * values, values.new_tensor([pairs])]).to(self.accelerator.device)
        total: Tensor = self.accelerator.reduce(local, "sum")
        return (total[:-1] / total[-1]).cpu()

    def state_dict(self) -> dict[str, float] | None:
        """Return the state for a checkpoint; None before the first batch or if the remedy has none."""
        return None if self.band is None else asdict(self.band)

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Restore the state of a checkpoint."""
        self.band = None if state is None else BandState(**state)
