"""Every pair once per epoch, for any number of processes.

If the number of pairs is not divisible by (batch size x processes), accelerate fills the last batches of an epoch with
duplicates from its beginning (``even_batches``), so that every process takes part in every step. Here the duplicates
are marked as not real, and the losses, statistics and metrics of the trainers exclude them: the last step is the mean
over the remaining pairs, as with one process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from align.errors import ConfigError
from align.models.collator import REAL, _pairs, counted


class WholeEpochs:
    """Mixin for a transformers Trainer of preference pairs, to be named before its class.

    Raises:
        ConfigError: with several processes, a setting under which pairs are lost or repeated; an epoch without a batch.
    """

    args: Any
    accelerator: Any
    train_dataset: Any

    def get_train_dataloader(self) -> Any:
        """Return the trainer's own loader, after a check of its settings."""
        self._check_steps()
        if self.accelerator.num_processes > 1:
            _check_distribution(self.args)
        return super().get_train_dataloader()  # type: ignore[misc]

    def _check_steps(self) -> None:
        """Refuse a training whose epochs have no batch."""
        pairs, batch = len(self.train_dataset), self.args.train_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and pairs < batch:
            raise ConfigError(
                f"dataloader_drop_last: found true and {pairs} pairs, expected at least the {batch} of a batch over "
                "all processes: no step would be made",
                code="trainer-key",
                hint="leave it out, or lower per_device_train_batch_size",
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return the trainer's own sampler; with several processes, length groups span all of them."""
        sampler: Sampler | None = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        processes = self.accelerator.num_processes
        if processes > 1 and isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= processes
        return sampler

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Count the real pairs of one optimizer step over its micro-batches and all processes; mark the duplicates."""
        if batch_samples:
            self._mark_duplicates(batch_samples[-1])
        local = sum(counted(batch) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor([local], device=device)).sum()

    def _mark_duplicates(self, batch: dict[str, Any]) -> None:
        """Add ``REAL`` to the last batch of an epoch if the batch of some process has duplicates."""
        processes, rows = self.accelerator.num_processes, _pairs(batch)
        remainder = len(self.train_dataset) % (processes * rows)
        last = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if processes > 1 and last and remainder:
            position = rows * self.accelerator.process_index + torch.arange(rows)
            batch[REAL] = (position < remainder).to(batch["input_ids"].device)


def _check_distribution(args: Any) -> None:
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
            "train_sampling_strategy: found batch_rebalance, which with several processes gives each a different "
            "number of pairs; expected random, sequential or group_by_length",
            code="trainer-key",
            hint="use group_by_length for batches of similar length",
        )
