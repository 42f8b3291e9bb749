"""The guard of a policy's training: checks the loss of every pair, finds the pair whose gradient is not finite."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from align.losses.pairwise import PairLogps
from align.models.collator import REAL, ROW, only_real
from align.models.layout import trim
from align.training.base.finite_guard import FiniteSteps, all_finite, gradient_norm


def number_rows(table: Dataset, first: int = 0) -> tuple[Dataset, list[str]]:
    """Return the table with its row numbers, from ``first``, in the column ``row``, and the id of the pair in each."""
    numbers = list(range(first, first + len(table)))
    ids = [str(name) for name in table["id"]] if "id" in table.column_names else [f"in row {k}" for k in numbers]
    return table.add_column(ROW, numbers), ids


class FiniteGuard(FiniteSteps):
    """Stops at the first loss, gradient or weight that is NaN or infinite and names the pair; see ``FiniteSteps``.

    Args:
        ids: id of the pair in row r of the training table.
        pair_loss: batch of one pair -> its loss, to search for the pair whose gradient is not finite.
        scaled: a loss scaler is in use.
    """

    def __init__(self, ids: Sequence[str], pair_loss: Callable[[dict[str, Any]], Tensor], *, scaled: bool) -> None:
        super().__init__(scaled=scaled)
        self.ids = ids
        self.pair_loss = pair_loss
        self._batches: list[dict[str, Any]] = []
        self._searching = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the batches of the previous step."""
        super().on_step_begin(args, state, control, **kwargs)
        self._batches = []

    def check_losses(
        self, inputs: dict[str, Any], losses: Tensor, logps: PairLogps, numbers: dict[str, Tensor | None]
    ) -> None:
        """Check the losses of one batch.

        Args:
            inputs: the batch; ``row`` [B] identifies its pairs.
            losses: [B], weight times loss.
            logps: log-probs from which the losses were computed, shown in the message.
            numbers: name -> further inputs of the loss, each [B], shown in the message.

        Raises:
            NumericsError: a loss is not finite.
        """
        if self._searching or ROW not in inputs:
            return
        self._batches.append(inputs)
        ids = self._ids_of(inputs)
        self.pairs += [ids[k] for k in only_real(torch.arange(len(ids)), inputs.get(REAL)).tolist()]
        if all_finite([losses.detach()]):
            return
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        first = {
            "chosen": logps.chosen, "rejected": logps.rejected, "reference chosen": logps.ref_chosen,
            "reference rejected": logps.ref_rejected, **numbers,
        }  # fmt: skip
        shown = [f"{name} {float(values[bad[0]]):.6g}" for name, values in first.items() if values is not None]
        self.stop("loss", [ids[k] for k in bad], f"is {float(losses[bad[0]])} ({', '.join(shown)})")

    def pairs_at_fault(self, model: nn.Module) -> list[str]:
        """Run a backward pass per pair; empty with several processes, or if only the sum of the gradients overflows."""
        self._searching = True
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        found = []
        for batch in () if distributed else self._batches:
            for k, name in enumerate(self._ids_of(batch)):
                model.zero_grad()
                self.pair_loss(trim(batch, torch.tensor([k]))).backward()
                if not math.isfinite(gradient_norm(model)):
                    found.append(name)
        self._searching = False
        return found

    def _ids_of(self, batch: dict[str, Any]) -> list[str]:
        return [self.ids[row] for row in batch[ROW].tolist()]
