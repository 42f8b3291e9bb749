"""Sharded checkpoints that are written while the training goes on (torch.distributed.checkpoint)."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from align.training.base.checkpoints import MODEL_SHARDS, OPTIMIZER_SHARDS


class BackgroundSaves:
    """Mixin for a transformers Trainer, to be named before its class.

    If checkpoints are sharded (FSDP2 with ``SHARDED_STATE_DICT``) and ``async_checkpoints`` is set, every process
    copies its shard of model and optimizer to host memory and continues with the next step, while one of its threads
    writes the copy. The files are those that accelerate writes and reads. A checkpoint counts once every shard is
    written (``last_complete_checkpoint``); until then no older one is removed. The next checkpoint waits for it.
    """

    async_checkpoints = False
    """Needs as much host memory as model and optimizer take on the devices."""
    args: Any
    state: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    is_fsdp_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing: list[Future[Any]] = []
        self._groups: dict[str, dist.ProcessGroup] = {}
        super().__init__(*args, **kwargs)
        self.add_callback(_FinishWriting(self))  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.finish_writing()
        limit = self.args.save_total_limit
        if self._writes_in_background():
            self.args.save_total_limit = None  # until this checkpoint is complete
        try:
            with _unwrap_failures():
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save model, optimizer and schedule: as the trainer does, or by starting to write shards in the background."""
        if not self._writes_in_background():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        options = StateDictOptions(ignore_frozen_params=hasattr(self.model, "peft_config"))
        self._write(Path(output_dir) / MODEL_SHARDS, "model", get_model_state_dict(self.model, options=options))
        self._write(
            Path(output_dir) / OPTIMIZER_SHARDS, "optimizer", get_optimizer_state_dict(self.model, self.optimizer)
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self) -> None:
        self.finish_writing()
        super()._load_best_model()  # type: ignore[misc]

    def finish_writing(self, *, wait: bool = True) -> None:
        """Wait until the last checkpoint is complete; then remove the oldest beyond ``save_total_limit``.

        Args:
            wait: False: return at once if the checkpoint is still being written.

        Raises:
            OSError: a process could not write its shard.
        """
        if not wait and not all(shard.done() for shard in self._writing):
            return
        written, self._writing = self._writing, []
        with _unwrap_failures():
            for shard in written:
                shard.result()
        if written and self.args.should_save:
            rotate_checkpoints(
                self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _writes_in_background(self) -> bool:
        """Whether FSDP2 shards checkpoints here; one that is pushed to the hub must be complete at once."""
        if not self.async_checkpoints or not self.is_fsdp_enabled or self.args.push_to_hub:
            return False
        plugin = self.accelerator.state.fsdp_plugin
        return plugin.fsdp_version == 2 and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)

    def _write(self, folder: Path, name: str, state: dict[str, Any]) -> None:
        """Start to write ``{name: state}`` into a folder.

        The writing thread has a process group of its own (gloo): the training's is busy with the next steps.
        """
        if name not in self._groups:
            self._groups[name] = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.args.ddp_timeout))
        folder.mkdir(parents=True, exist_ok=True)  # without its metadata it marks the checkpoint as incomplete
        future = async_save({name: state}, storage_writer=FileSystemWriter(folder), process_group=self._groups[name])
        self._writing.append(future if isinstance(future, Future) else future.upload_completion)


@contextmanager
def _unwrap_failures() -> Iterator[None]:
    """Raise the first error inside a CheckpointException, which is not a subclass of Exception."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error


class _FinishWriting(TrainerCallback):
    """Reports a failed background write after the next step, and waits for the last one at the end of the training."""

    def __init__(self, trainer: BackgroundSaves) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise the error of a failed write; delete checkpoints beyond save_total_limit."""
        self.trainer.finish_writing(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the last checkpoint, so that it is complete when ``train`` returns."""
        self.trainer.finish_writing()
