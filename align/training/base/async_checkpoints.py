"""Checkpoints in parts, written while the training goes on (torch.distributed.checkpoint)."""

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

from align.training.base.checkpoints import MODEL_PARTS, OPTIMIZER_PARTS


class BackgroundSaves:
    """Mixed into a transformers Trainer, before its class.

    Where checkpoints are in parts (FSDP2 with ``SHARDED_STATE_DICT``) and ``in_background`` is set, every process
    copies its part of model and optimizer into memory and goes on with the next step, while a thread of it writes the
    copy. The parts are those that accelerate writes and reads. A checkpoint counts once all are written
    (``last_whole_checkpoint``), and until then none of the older ones is removed. The next checkpoint waits for it.
    """

    in_background = False
    """Needs as much memory of the machine as model and optimizer take on its devices."""
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
        self.add_callback(_WhileWriting(self))  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.finish_writing()
        limit = self.args.save_total_limit
        if self._writes_in_background():
            self.args.save_total_limit = None  # until this one is whole
        try:
            with _failures_of_parts():
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Model, optimizer and schedule: the trainer's own, or begun here and written meanwhile."""
        if not self._writes_in_background():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        options = StateDictOptions(ignore_frozen_params=hasattr(self.model, "peft_config"))
        self._write(Path(output_dir) / MODEL_PARTS, "model", get_model_state_dict(self.model, options=options))
        self._write(
            Path(output_dir) / OPTIMIZER_PARTS, "optimizer", get_optimizer_state_dict(self.model, self.optimizer)
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self) -> None:
        self.finish_writing()
        super()._load_best_model()  # type: ignore[misc]

    def finish_writing(self, *, wait: bool = True) -> None:
        """Wait until the checkpoint that is being written is whole; then remove the oldest beyond ``save_total_limit``.

        Args:
            wait: or do so only if it is whole already.

        Raises:
            OSError: of the process that could not write its part.
        """
        if not wait and not all(part.done() for part in self._writing):
            return
        written, self._writing = self._writing, []
        with _failures_of_parts():
            for part in written:
                part.result()
        if written and self.args.should_save:
            rotate_checkpoints(
                self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _writes_in_background(self) -> bool:
        """Whether checkpoints are in parts here, by FSDP2; one that goes to the hub at once must be whole at once."""
        if not self.in_background or not self.is_fsdp_enabled or self.args.push_to_hub:
            return False
        plugin = self.accelerator.state.fsdp_plugin
        return plugin.fsdp_version == 2 and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)

    def _write(self, folder: Path, name: str, state: dict[str, Any]) -> None:
        """Begin to write ``{name: state}`` into a folder.

        The thread has processes of its own to talk to (gloo), for those of the training are busy with its steps.
        """
        if name not in self._groups:
            self._groups[name] = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.args.ddp_timeout))
        folder.mkdir(parents=True, exist_ok=True)  # there from the start: without its metadata it is not whole
        begun = async_save({name: state}, storage_writer=FileSystemWriter(folder), process_group=self._groups[name])
        self._writing.append(begun if isinstance(begun, Future) else begun.upload_completion)


@contextmanager
def _failures_of_parts() -> Iterator[None]:
    """Raise what a process's part failed of: torch's own exception is none that a program catches."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error


class _WhileWriting(TrainerCallback):
    """Ends a write that is done, and at the end of the training waits for it."""

    def __init__(self, trainer: BackgroundSaves) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell a failed write at once, and remove what is old."""
        self.trainer.finish_writing(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last checkpoint is whole when the training returns."""
        self.trainer.finish_writing()
