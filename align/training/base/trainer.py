"""ReliableTrainer: everything that a trl trainer gains here, in one class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from align.distributed import from_main_process
from align.errors import ConfigError
from align.io.console import log
from align.training.base.argument_types import check_checkpoint_argument
from align.training.base.async_checkpoints import BackgroundSaves
from align.training.base.card_settings import low_precision
from align.training.base.checkpoints import check_resumable, last_complete_checkpoint
from align.training.base.described import Described
from align.training.base.epochs import WholeEpochs
from align.training.base.finite_guard import FiniteSteps
from align.training.base.live_log import LIVE, LiveLog
from align.training.base.progress import show_progress
from align.training.base.resume import ExactResume
from align.training.base.stopping import stoppable


class ReliableTrainer(Described, BackgroundSaves, ExactResume, WholeEpochs, Trainer):
    """A Trainer that resumes to the bit, counts every pair once an epoch and stops at the first NaN or infinity.

    Name it before the trl class: ``class PreferenceTrainer(ReliableTrainer, DPOTrainer)``. The table lists each method
    of ``transformers.Trainer`` that is overridden, by whom (outermost first; each calls the next and then trl's), and
    what holds because of it.

    | method | overridden by | guarantee |
    |---|---|---|
    | `train` | ReliableTrainer | `"auto"` resumes from the last complete checkpoint, if there is one. |
    | `_get_train_sampler` | ExactResume, WholeEpochs | The order depends on seed and epoch alone; length groups span processes. |
    | `get_eval_dataloader` | ReliableTrainer | An evaluation without a table is refused. |
    | `hyperparameter_search` | ReliableTrainer | It is refused: the model is given, not made for each trial. |
    | `get_train_dataloader` | WholeEpochs | Settings that would lose or repeat pairs are refused. |
    | `get_batch_samples` | ExactResume | No step is made beyond the last one. |
    | `_get_num_items_in_batch` | WholeEpochs | Duplicates that only fill the last batch are marked and not counted. |
    | `_set_signature_columns_if_needed` | ReliableTrainer | `extra_columns` reach the collator. |
    | `_get_grad_norm` | ReliableTrainer | A gradient that is not finite never reaches the weights. |
    | `_save_checkpoint` | ReliableTrainer, BackgroundSaves | The checkpoint holds `save_extra_state`; older ones outlive an incomplete one. |
    | `_save` | ReliableTrainer | The saved arguments hold no token of the hub. |
    | `_save_optimizer_and_scheduler` | BackgroundSaves | Shards are written while training goes on, if `async_checkpoints`. |
    | `_save_rng_state` | ExactResume | Every process has saved before trainer_state.json completes the checkpoint. |
    | `save_model` | Described | A saved folder has a model card that is true. |
    | `create_model_card` | Described | trl's card never replaces it. |
    | `init_hf_repo` | Described | A new repository on the hub is private. |
    | `_load_best_model` | BackgroundSaves | The checkpoint that is being written is complete first. |
    | `_load_from_checkpoint` | ReliableTrainer, ExactResume | Other pairs per step, another loss or table, or no optimizer, are refused; `load_extra_state` follows. |

    A subclass may override ``make_guard``, ``save_extra_state``, ``load_extra_state`` and ``extra_columns``.
    """  # noqa: E501  rows of a table

    guard: FiniteSteps
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError(
                "found no weight that would be trained, expected some to require gradients",
                code="trainer-key",
                hint="name modules that the model has, or train all weights",
            )
        if kept := low_precision(self.model):
            log.warning("model: weights in %s are trained, where steps far smaller than a weight are lost; load "
                        'it with dtype="float32" and set bf16=True to compute in 16 bits', kept)  # fmt: skip
        self.guard = self.make_guard(scaled=self.accelerator.scaler is not None)
        self.add_callback(self.guard)

    def make_guard(self, *, scaled: bool) -> FiniteSteps:
        """Return the callback that checks losses, gradients and weights.

        Args:
            scaled: a loss scaler (fp16) is in use.
        """
        return FiniteSteps(scaled=scaled)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Columns of the training table that the collator reads besides trl's own."""
        return (self.args.length_column_name,)

    def save_extra_state(self, folder: Path) -> None:
        """Write what a resumed training needs besides trl's state; only the process that saves calls it."""

    def load_extra_state(self, folder: Path) -> None:
        """Restore what ``save_extra_state`` wrote; every process calls it."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does.

        Args:
            resume_from_checkpoint: as there, or ``"auto"``: the last complete checkpoint in ``output_dir``, or the
                start if there is none; newer, incomplete checkpoints are removed.
            args: those of ``transformers.Trainer.train``.
            kwargs: those of ``transformers.Trainer.train``.

        Raises:
            ConfigError: the checkpoint cannot be resumed from: another number of pairs per step, another loss or
                other pairs, no optimizer.
        """
        check_checkpoint_argument(resume_from_checkpoint, Path(self.args.output_dir))
        checkpoint: Any = resume_from_checkpoint
        if checkpoint == "auto":
            checkpoint = from_main_process(lambda: last_complete_checkpoint(Path(self.args.output_dir)))
            if checkpoint is not None:
                log.info("resuming from %s", checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    @contextmanager
    def trained(self, what: str) -> Iterator[None]:
        """Train, from the last complete checkpoint in ``output_dir`` if there is one; the block follows the last step.

        The first Ctrl-C or SIGTERM lets the current step finish and saves a checkpoint; within the block, it lets the
        block finish.

        Args:
            what: name of the training, for messages.

        Raises:
            SystemExit: the training was stopped by a signal.
        """
        show_progress(self, what)
        live = LiveLog(Path(self.args.output_dir).with_name(LIVE))
        self.add_callback(live)
        with stoppable(self) as stop:
            self.train(resume_from_checkpoint="auto")
            stop.check()
            if self.is_world_process_zero():
                live.remove()
            yield

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation as transformers does.

        Raises:
            ConfigError: there is no table to evaluate on.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise ConfigError(
                "eval_dataset: found None, expected a table of pairs",
                code="data-type",
                hint="give it to the trainer, or to evaluate()",
            )
        return super().get_eval_dataloader(eval_dataset)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a search, for which transformers makes the model anew in each trial; trl's trainers take it once.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "hyperparameter_search: found a trainer that is given its model, expected one that makes it for each trial",
            code="trainer-key",
            hint="make a trainer for each trial, in the objective of the search",
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *self.extra_columns]

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.check_norm(model, norm)
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.save_extra_state(folder)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_resumable(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_extra_state(Path(resume_from_checkpoint))
