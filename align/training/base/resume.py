"""Exact resume: a stopped training continues with the same pairs in the same order, and makes no step too many.

The number of processes may change, as long as the number of pairs per step does not.
"""

import json
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
"""File of a checkpoint: number of pairs per optimizer step over all processes, and ``ExactResume.trained_under``."""
SHARDED = f"{FSDP_MODEL_NAME}*"
"""Files and folders that accelerate writes into a checkpoint under FSDP."""


class ExactResume:
    """Mixin for a transformers Trainer, to be named before its class.

    The trainer itself draws the order of length-grouped pairs from torch's global generator, whose state differs after
    a resume: in the middle of any epoch but the first it would continue with pairs that the epoch has already used. And
    it checks for the end only after a step, so a training resumed from its last checkpoint would make one more.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    is_fsdp_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_OneSavePerStep())  # type: ignore[attr-defined]

    @property
    def trained_under(self) -> dict[str, Any]:
        """What a resumed training has in common with the one that wrote its checkpoint: plain JSON values by name."""
        return {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return the trainer's own sampler; a shuffling one gets an order that depends on seed and epoch alone."""
        sampler: Sampler | None = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return self.seeded(sampler) if isinstance(sampler, RandomSampler | LengthGroupedSampler) else sampler

    def seeded(self, sampler: RandomSampler | LengthGroupedSampler) -> Sampler:
        """Return a sampler whose order depends on seed and epoch alone."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _EpochSeededSampler(sampler, seed, self)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of the next step; after the last step, none, and stop the training."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state of every process; the trainer's state, which completes the checkpoint, follows."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            write_json(Path(output_dir) / STEP, {"pairs": self._pairs_per_step()} | self.trained_under)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load as the trainer does, if the number of pairs per step is that of the checkpoint.

        Raises:
            ConfigError: the number of pairs per step differs, so a step of the checkpoint is not one of this training;
                the checkpoint is of another loss or other pairs; or it is sharded (FSDP) and this training is not.
        """
        if any(Path(resume_from_checkpoint).glob(SHARDED)) and not self.is_fsdp_enabled:
            raise ConfigError(
                f"{resume_from_checkpoint}: was written by a sharded training (FSDP), and this one is not",
                code="sharded-checkpoint",
                hint="start it as before, with accelerate's configuration for FSDP and at least two processes",
            )
        file = Path(resume_from_checkpoint) / STEP
        written = read_json(file) if file.exists() else {}
        before, now = written.get("pairs"), self._pairs_per_step()
        if before not in (None, now):
            raise ConfigError(
                f"{resume_from_checkpoint}: was written with {before} pairs a step, and now a step has {now}",
                code="pairs-per-step",
                hint="start as many processes as before; `pairs_per_step` under train or reward, set from the start, "
                "keeps the pairs of a step whatever the number of processes",
            )
        for name, value in json.loads(json.dumps(self.trained_under)).items():
            if name in written and written[name] != value:
                raise ConfigError(
                    f"{resume_from_checkpoint}: was written by a training with {name} {written[name]}, and this one "
                    f"has {value}",
                    code="checkpoint-training",
                    hint="give this training another output_dir, or the checkpoint as the model that it starts from",
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _pairs_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes


class _EpochSeededSampler(Sampler):
    """Yields ``inner``'s order under a generator seeded with ``seed`` + the current epoch of the trainer."""

    def __init__(self, inner: RandomSampler | LengthGroupedSampler, seed: int, trainer: Any) -> None:
        self.inner = inner
        self.seed = seed
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        self.inner.generator = torch.Generator().manual_seed(self.seed + int(self.trainer.state.epoch))
        return iter(self.inner)


class _OneSavePerStep(TrainerCallback):
    """Prevents a second save of the same step: killed during it, the checkpoint would only look complete."""

    def __init__(self) -> None:
        self.saved = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the step from which the training resumes has a checkpoint."""
        self.saved = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the saved step."""
        self.saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Withdraw the trainer's request for a second save."""
        control.should_save = control.should_save and state.global_step != self.saved
