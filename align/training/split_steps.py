"""Steps whose batch is trained in parts, without the pairs that cannot change it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from align.losses.pair_weights import LossTilt
from align.losses.registry import LOSSES, BoundLoss
from align.models.batching import in_so_many, pair_batches
from align.models.collator import REAL, only_real
from align.models.layout import trim
from align.training.gradient_remedy import GradientRemedy
from align.training.prompt_order import PromptOrder
from align.training.tied_embedding import as_rows
from align.training.token_mask import TokenMask
from align.training.trained_tables import TrainedTables


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The pairs of weight 0 that a step does not compute."""

    weight: Tensor
    """[b], zeros."""
    margin: Tensor | None
    real: Tensor | None
    """[b], False for duplicates that only fill the batch; None: there are none."""


class SplitSteps(TrainedTables):
    """A trainer of pairs whose step keeps to a budget of tokens and leaves out pairs of weight 0."""

    loss: BoundLoss
    tilt: LossTilt | None
    remedy: GradientRemedy | None
    token_mask: TokenMask | None
    left_out: LeftOut | None = None
    """Pairs that the running step does not compute, until its first forward pass has counted them."""
    _tied: nn.Embedding | None
    """The embedding whose gradient is added to the head's row by row."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return trl's sampler, or with ``group_by_prompt`` one under which the pairs of a prompt meet in a batch."""
        if not self.args.group_by_prompt:
            sampler: Sampler | None = super()._get_train_sampler(train_dataset)
            return sampler
        return self.seeded(PromptOrder(self.train_dataset["prompt_ids"]))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Run one batch forward and backward, in micro-batches of at most ``max_tokens`` tokens.

        A pair of weight 0 adds nothing to the loss or to a gradient, so it is left out where the losses of the others
        do not depend on it; it counts for the mean, which is over ``num_items_in_batch``.
        """
        trained, self.left_out = inputs, None
        if num_items_in_batch is not None and self._leaves_out():
            trained, self.left_out = _without_weight_0(inputs)
        *first, last = self._micro_batches(trained)
        total = torch.zeros((), device=self.accelerator.device)
        with as_rows(self._tied):
            for batch in first:
                with self.accelerator.no_sync(model):
                    total += super().training_step(model, batch, num_items_in_batch)
            total += super().training_step(model, last, num_items_in_batch)
        lengths = inputs["attention_mask"].sum(dim=1).view(2, -1).sum(dim=0)
        self._total_train_tokens += int(self.accelerator.gather(only_real(lengths, inputs.get(REAL)).sum()).sum())
        return total

    def _leaves_out(self) -> bool:
        """Whether a pair of weight 0 can be left out: nothing compares pairs, and no noise is drawn for each of them.

        Packed pairs draw no noise (``choose_layout``). Processes that shard the model must run as many passes.
        """
        compared = self.loss.spec.coupled or self.tilt is not None or self.remedy is not None
        own = any(LOSSES.get(part.spec.name) is not part.spec for part in self.loss.parts)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        noiseless = self.layout == "shared_prefix"
        return noiseless and not (compared or own or sharded or self.aux_loss_enabled or self.token_mask is not None)

    def _micro_batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Split the batch under the token budget, pairs of similar length together.

        A batch stays in one piece if the tilt or the remedy compares its pairs with each other.
        """
        coupled = self.tilt is not None or (self.remedy is not None and self.remedy.coupled)
        if self.max_tokens is None or coupled:
            return [inputs]
        batches = pair_batches(inputs, self.layout, self.max_tokens)
        if self.is_fsdp_enabled:  # each forward pass gathers parameters from all processes
            count = torch.tensor([len(batches)], device=self.accelerator.device)
            batches = in_so_many(batches, int(self.accelerator.gather(count).max()))
        return [trim(inputs, torch.tensor(sorted(batch))) for batch in batches]


def _without_weight_0(inputs: dict[str, Any]) -> tuple[dict[str, Any], LeftOut | None]:
    """The pairs of a batch with a weight, and the others; all pairs if none has, for a step has a backward pass."""
    weight = inputs.get("weight")
    if weight is None or bool((weight != 0).all()) or not bool((weight != 0).any()):
        return inputs, None
    none = (weight == 0).nonzero().flatten()
    columns = (inputs.get("margin"), inputs.get(REAL))
    margin, real = (None if column is None else column[none] for column in columns)
    return trim(inputs, (weight != 0).nonzero().flatten()), LeftOut(weight[none], margin, real)
