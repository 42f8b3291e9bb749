"""A training that was stopped goes on as if it had not been: the same pairs in the same order, and no step too many.

So does one that goes on in another number of processes, as long as a step has as many pairs as before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from align.errors import ConfigError
from align.io.files import read_json, write_json

STEP = "step.json"
"""File of a checkpoint: how many pairs a step has over all processes."""
SHARDED = f"{FSDP_MODEL_NAME}*"
"""What accelerate leaves in a checkpoint under FSDP."""


class ExactResume:
    """Mixed into a transformers Trainer, before its class.

    The trainer itself draws the order of length-grouped pairs from torch's generator, which a resumed process finds in
    another state: in the middle of any epoch but the first it would go on with pairs that the epoch has seen. And it
    looks whether it is done only after a step, so that a training resumed from its last checkpoint makes one more.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    is_fsdp_enabled: bool

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

    def _save_rng_state(self, output_dir: str) -> None:
        """The random state of every process; then the trainer's state makes the checkpoint one that counts."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            write_json(Path(output_dir) / STEP, {"pairs": self._pairs_per_step()})
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The trainer's own, where a step has as many pairs as it had.

        Raises:
            ConfigError: it has not: what the checkpoint counts as steps would be other pairs. Or the checkpoint is one
                of FSDP and this training is not sharded.
        """
        if any(Path(resume_from_checkpoint).glob(SHARDED)) and not self.is_fsdp_enabled:
            raise ConfigError(
                f"{resume_from_checkpoint}: was written by a sharded training (FSDP), and this one is not",
                code="sharded-checkpoint",
                hint="start it as before, with accelerate's configuration for FSDP and at least two processes",
            )
        file = Path(resume_from_checkpoint) / STEP
        before, now = read_json(file)["pairs"] if file.exists() else None, self._pairs_per_step()
        if before not in (None, now):
            raise ConfigError(
                f"{resume_from_checkpoint}: was written with {before} pairs a step, and now a step has {now}",
                code="pairs-per-step",
                hint="start as many processes as before; `pairs_per_step` under train or reward, set from the start, "
                "keeps the pairs of a step whatever the number of processes",
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _pairs_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes


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
