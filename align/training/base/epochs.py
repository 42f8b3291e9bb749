"""Every pair once an epoch, whatever the number of processes.

Where the pairs do not divide by (pairs of a batch x processes), accelerate fills the last batches of an epoch up with
pairs from its beginning, so that every process takes part in every step. Those pairs are marked here as not real, and
the losses, statistics and metrics of the trainers leave them out: the last step is the mean over the pairs that are
left, as with one process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from align.errors import ConfigError
from align.models.collator import REAL, _pairs, counted


class WholeEpochs:
    """Mixed into a transformers Trainer of preference pairs, before its class.

    Raises:
        ConfigError: with several processes, a way of dealing out the pairs that loses some or repeats them.
    """

    args: Any
    accelerator: Any
    train_dataset: Any

    def get_train_dataloader(self) -> Any:
        """The trainer's own loader."""
        if self.accelerator.num_processes > 1:
            _check_dealing(self.args)
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The trainer's own; groups of like length are formed over all processes."""
        sampler: Sampler | None = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        processes = self.accelerator.num_processes
        if processes > 1 and isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= processes
        return sampler

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Pairs of one optimizer step, over its micro-batches and all processes; marks those that do not count."""
        if batch_samples:
            self._mark(batch_samples[-1])
        own = sum(counted(batch) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor([own], device=device)).sum()

    def _mark(self, batch: dict[str, Any]) -> None:
        """Give the last batch of an epoch the column ``REAL`` where some process has pairs that do not count."""
        processes, rows = self.accelerator.num_processes, _pairs(batch)
        left = len(self.train_dataset) % (processes * rows)
        last = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if processes > 1 and last and left:
            place = rows * self.accelerator.process_index + torch.arange(rows)
            batch[REAL] = (place < left).to(batch["input_ids"].device)


def _check_dealing(args: Any) -> None:
    settings = args.accelerator_config
    for name, refused in (("even_batches", False), ("dispatch_batches", True)):
        if getattr(settings, name) is refused:
            raise ConfigError(
                f"accelerator_config.{name}: found {str(refused).lower()}, which with several processes loses pairs "
                "or stops in the middle of an epoch",
                code="trainer-key",
                hint="leave it out",
            )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            "train_sampling_strategy: found batch_rebalance, which with several processes gives each another number "
            "of pairs; expected random, sequential or group_by_length",
            code="trainer-key",
            hint="use group_by_length for batches of like length",
        )
