"""A training that was stopped goes on as if it had not been: the same pairs in the same order, and no step too many."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class ExactResume:
    """Mixed into a transformers Trainer, before its class.

    The trainer itself draws the order of length-grouped pairs from torch's generator, which a resumed process finds in
    another state: in the middle of any epoch but the first it would go on with pairs that the epoch has seen. And it
    looks whether it is done only after a step, so that a training resumed from its last checkpoint makes one more.
    """

    args: Any
    state: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_OneSaveAStep())  # type: ignore[attr-defined]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The trainer's own; where it shuffles, in an order that depends on the seed and the epoch alone."""
        sampler: Sampler | None = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if not isinstance(sampler, RandomSampler | LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _OrderOfEpoch(sampler, seed, self)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of the next step; none, and the end, where every step has been made."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]


class _OrderOfEpoch(Sampler):
    """``inner``'s order under a generator seeded with ``seed`` + the epoch that the trainer's state is in."""

    def __init__(self, inner: RandomSampler | LengthGroupedSampler, seed: int, trainer: Any) -> None:
        self.inner = inner
        self.seed = seed
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        self.inner.generator = torch.Generator().manual_seed(self.seed + int(self.trainer.state.epoch))
        return iter(self.inner)


class _OneSaveAStep(TrainerCallback):
    """Writes no checkpoint of a step a second time: killed meanwhile, it would look whole and not be."""

    def __init__(self) -> None:
        self.saved = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step resumed from has a checkpoint."""
        self.saved = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember it."""
        self.saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the trainer's request back."""
        control.should_save = control.should_save and state.global_step != self.saved
