"""A remedy against gradient entanglement inside the training: each batch is measured before its step."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from align.config import RemedySection
from align.config.columns import IN_BATCH
from align.entanglement.conditions import loss_weights
from align.entanglement.products import GradientProducts
from align.entanglement.remedies import BandState, calibrate, hold_batch, hold_chosen, normalise
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss
from align.models.collator import counted

GRADIENT_INPUTS = ("input_ids", "attention_mask", "completion_mask")


class GradientRemedy:
    """Factors for the chosen and the rejected gradient of each pair of a batch (align/entanglement/remedies.py).

    Costs one forward pass and one backward pass through the activations per batch.

    Args:
        model: the policy, not wrapped by a launcher.
        loss: the loss in use, not beta_dpo.
        config: which remedy.
        accelerator: averages over processes.
    """

    def __init__(self, model: nn.Module, loss: BoundLoss, config: RemedySection, accelerator: Accelerator) -> None:
        self.measure = GradientProducts(model, config.parameters)
        self.loss = loss
        self.config = config
        self.accelerator = accelerator
        self.band: BandState | None = None

    @property
    def of_whole_batches(self) -> bool:
        """Whether a factor depends on the whole batch, which then must not be split."""
        return self.config.kind in ("hold_batch", "calibrate")

    def factors(self, inputs: dict[str, Any], ref_chosen: Tensor, ref_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """a_w and a_l, each [B], float32 on the device of ``inputs``, at the parameters as they are.

        Args:
            inputs: a batch as ``PairCollator`` makes it.
            ref_chosen: reference log-probs [B].
            ref_rejected: reference log-probs [B].
        """
        batch = {name: inputs[name] for name in GRADIENT_INPUTS}
        gram = None
        if self.of_whole_batches:
            gram, found = self.measure.gram_and_pairs(batch)
        else:
            found = self.measure(batch)
        logps = PairLogps(
            found.chosen_logps,
            found.rejected_logps,
            ref_chosen.double().cpu(),
            ref_rejected.double().cpu(),
            found.chosen_length,
            found.rejected_length,
        )
        own = {name: inputs[name].cpu() for name in IN_BATCH if name in inputs}
        d_w, d_l = loss_weights(self.loss, logps, **own)
        if gram is None and self.config.kind == "hold_chosen":
            factors = hold_chosen(found.chosen_sq, found.inner, d_w, d_l, keep=self.config.keep)
        elif gram is None:
            factors = normalise(found.chosen_sq, found.rejected_sq, d_w, d_l)
        elif self.config.kind == "hold_batch":
            factors = hold_batch(gram, d_w, d_l, keep=self.config.keep)
        else:
            mean = partial(self._mean, pairs=counted(inputs))
            *factors, self.band = calibrate(gram, d_w, d_l, self.band, decay=self.config.decay, mean=mean)  # type: ignore[assignment]
        device = ref_chosen.device
        return factors[0].float().to(device), factors[1].float().to(device)

    def _mean(self, values: Tensor, *, pairs: int) -> Tensor:
        """Over processes, each with the pairs that it has in this step; one that only fills it up has none."""
        own = torch.cat([pairs * values, values.new_tensor([pairs])]).to(self.accelerator.device)
        found: Tensor = self.accelerator.reduce(own, "sum")
        return (found[:-1] / found[-1]).cpu()

    def to_dict(self) -> dict[str, float] | None:
        """State for a checkpoint."""
        return None if self.band is None else asdict(self.band)

    def load(self, state: dict[str, float] | None) -> None:
        """Take up the state of a checkpoint."""
        self.band = None if state is None else BandState(**state)
