"""The reward trainer that stops at a loss that is not finite and names the pair; trl's own in everything else."""

from collections.abc import Sequence
from typing import Any

import torch
from trl import RewardTrainer

from align.background_saves import BackgroundSaves
from align.finite import FiniteSteps
from align.resuming import ExactResume
from align.whole_epochs import REAL, WholeEpochs, only_real


class GuardedRewardTrainer(BackgroundSaves, ExactResume, WholeEpochs, RewardTrainer):
    """trl's RewardTrainer with a look at every loss, gradient and weight; see ``FiniteSteps``.

    Args:
        ids: id of the pair in each row of ``train_dataset``.
        kwargs: those of ``trl.RewardTrainer``; ``train_dataset`` has ``chosen_ids`` and ``rejected_ids``.
    """

    _signature_columns: Any

    def __init__(self, *, ids: Sequence[str], **kwargs: Any) -> None:
        table = kwargs["train_dataset"]
        rows = zip(table["chosen_ids"], table["rejected_ids"], strict=True)
        self._names = {
            (tuple(chosen), tuple(rejected)): name for (chosen, rejected), name in zip(rows, ids, strict=True)
        }
        super().__init__(**kwargs)
        self.guard = FiniteSteps(scaled=self.accelerator.scaler is not None)
        self.add_callback(self.guard)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the lengths: the sampler groups by them."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, self.args.length_column_name]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """trl's loss, of all pairs of the batch; its metrics too count those that only fill a last batch up.

        Raises:
            NumericsError: a reward of a pair is not finite.
        """
        batch = {name: value for name, value in inputs.items() if name != REAL}
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            self._look(inputs, outputs.logits.detach())
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.look_at_norm(model, norm)
        return norm

    def _look(self, inputs: dict[str, Any], rewards: torch.Tensor) -> None:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = [tuple(row[:n]) for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        half = len(rows) // 2
        names = [self._names.get(pair, "unknown") for pair in zip(rows[:half], rows[half:], strict=True)]
        self.guard.pairs += [names[k] for k in only_real(torch.arange(half), inputs.get(REAL)).tolist()]
        pairs = rewards.squeeze(-1).view(2, half)
        bad = (~torch.isfinite(pairs).all(dim=0)).nonzero().flatten().tolist()
        if bad:
            chosen, rejected = pairs[:, bad[0]].tolist()
            said = f"is not finite (reward of chosen {chosen}, of rejected {rejected})"
            self.guard.stop("loss", [names[k] for k in bad], said)
