"""The forward passes of an evaluation: numbers of each held-out pair under the policy and the reference.

They draw no random number and change no state of the training, so a training that evaluates makes the same steps as one
that does not.
"""

from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.config.columns import ID_COLUMNS, REFERENCE_COLUMNS
from align.errors import ConfigError
from align.io.files import atomic_write, read_json, write_json
from align.losses.pairwise import PairLogps
from align.models.batching import token_batches
from align.models.exact_kl import ReferenceStates, frozen_head
from align.models.layout import base_model, has_adapter
from align.models.lm_head import LogitForm
from align.models.logps import SequenceLogps, pair_logps, pair_states
from align.training.held_out import KL_FIELDS
from align.training.pair_losses import PairLosses
from align.training.reference import reference_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from align.training.trainer import PreferenceTrainer

STATES_BYTES = 2**29
"""Most bytes of the reference's states on disk; with more tokens, the KL is that of a random part of the pairs."""
FOLDER = "reference"
COMPLETE, HEAD = "complete.json", "head.safetensors"
FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")


class HeldOutPass:
    """Measures a table of pairs under the policy of a trainer as it is.

    Log-probs of the reference and, for the exact KL, its last hidden states are written to disk once, before the first
    step; a policy then needs one forward pass per pair, and the vocabulary a second time. They come from the same pass,
    in the same batches, as those of the policy, so that a policy that has not moved differs by nothing, not even by
    rounding. Where the model is sharded over processes there is no KL.

    Args:
        trainer: prepared by ``train``, or about to be.
        table: its tokenized held-out pairs.
        folder: for the states of the reference; of this table and training only.
    """

    def __init__(self, trainer: "PreferenceTrainer", table: Dataset, folder: Path) -> None:
        self.trainer = trainer
        self.table = table
        self.folder = folder / FOLDER
        columns = (table[name] for name in ID_COLUMNS)
        self._lengths = [[len(ids) for ids in row] for row in zip(*columns, strict=True)]
        """Tokens of the prompt, the chosen and the rejected response of every pair."""
        self.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        chosen = [] if self.sharded else self._with_kl()
        self.batches = self._batches(chosen)
        self.kl_batches = len(self.batches)
        """The KL is computed for the first so many batches."""
        self.batches += self._batches(sorted({*range(len(table))} - {*chosen}))
        self.tokens = sum(row[0] + sum(row) for row in self._lengths)
        """Tokens of both sequences of every pair, each with the prompt."""
        self.reads = trainer.loss.spec.tokens != "none" or trainer.token_mask is not None
        """Whether the loss reads more of the tokens than their log-probs."""
        self.compares = trainer.loss.spec.coupled and trainer.loss.spec.tokens == "none" and trainer.token_mask is None
        """Whether the losses are computed when all pairs have been measured."""
        self._head: nn.Module | None = None

    def prepare(self) -> None:
        """Compute the states of the reference, or find them complete; every process calls this before the first step.

        Raises:
            ConfigError: the states are gone, and the policy is no longer the reference.
        """
        complete, trainer = self.folder / COMPLETE, self.trainer
        made = {"layout": trainer.layout, "batches": len(self.batches), "kl": self.kl_batches}
        if trainer.is_deepspeed_enabled or (complete.exists() and read_json(complete) == made):
            return
        live = trainer.ref_model is not None or has_adapter(trainer.accelerator.unwrap_model(trainer.model))
        if trainer.state.global_step and not live:
            raise ConfigError(
                f"{self.folder}: found no complete states of the reference, which the first step has changed",
                code="eval-config",
                hint="remove the checkpoints to train from the start",
            )
        accelerator = trainer.accelerator
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._reference() as model, trainer.compute_loss_context_manager():
            for k, own in self._shares():
                found = self._of_reference(model, k)
                if own:
                    self._save(self._file(k), found)
            if self.kl_batches and accelerator.is_main_process and self._changes(_head_of(model)):
                head = frozen_head(_head_of(model), base_model(model).config.get_text_config().hidden_size)
                self._save(self.folder / HEAD, dict(head.state_dict()))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(complete, made)
        accelerator.wait_for_everyone()

    def _of_reference(self, model: nn.Module, k: int) -> dict[str, Tensor]:
        """Log-probs of a batch under the reference, computed as those of the policy will be, and its states."""
        batch, layout, said = self._batch(self.batches[k]), self.trainer.layout, None
        if k < self.kl_batches:
            states = pair_states(model, batch, layout)
            said = ReferenceStates(states, _head_of(model), LogitForm.of(base_model(model).config))
        found = pair_logps(model, batch, layout, metrics=self.reads, reference=said)
        logps = {"chosen": found.chosen, "rejected": found.rejected}
        return logps if said is None else logps | {"states": said.states}

    def _shares(self) -> "Iterator[tuple[int, bool]]":
        """Batches of this process, and whether it keeps the result: processes of a sharded model run equally many."""
        accelerator = self.trainer.accelerator
        for start in range(0, len(self.batches), accelerator.num_processes):
            k = start + accelerator.process_index
            if k < len(self.batches) or self.sharded:
                yield (k, True) if k < len(self.batches) else (0, False)

    def __call__(self) -> dict[str, np.ndarray]:
        """Numbers of every pair, float64 [N]; every process calls this and gets them all."""
        accelerator, rows = self.trainer.accelerator, len(self.table)
        losses = self._losses()
        values: dict[str, np.ndarray] = defaultdict(lambda: np.full(rows, np.nan))
        computed = []
        for k, own in self._shares():
            columns = self._measure(k, losses)
            computed += [(self.batches[k], columns)] if own else []
        for batch, columns in gather_object(computed) if accelerator.num_processes > 1 else computed:
            for name, column in columns.items():
                values[name][batch] = column
        found = dict(values)
        if self.compares:
            found |= self._compared(found, losses)
        for name in KL_FIELDS:
            found.setdefault(name, np.full(rows, np.nan))
        return found

    def _measure(self, k: int, losses: PairLosses) -> dict[str, np.ndarray]:
        trainer, batch = self.trainer, self._batch(self.batches[k])
        model = trainer.model_wrapped if self.sharded else trainer.model
        kept = {} if trainer.is_deepspeed_enabled else self._read(self._file(k))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            reference = self._reference_logps(batch, kept)
            said = self._states(kept["states"]) if "states" in kept else None
            policy = pair_logps(model, batch, trainer.layout, metrics=self.reads, reference=said)
            columns = self._columns(policy, *reference)
            if not self.compares:
                logps = PairLogps(
                    chosen=policy.chosen, rejected=policy.rejected, ref_chosen=reference[0], ref_rejected=reference[1],
                    chosen_length=policy.chosen_length, rejected_length=policy.rejected_length,
                )  # fmt: skip
                columns |= _weighted(*losses(policy, logps, batch, step=0, training=False), batch.get("weight"))
        return {name: column.double().cpu().numpy() for name, column in columns.items()}

    def _reference_logps(self, batch: dict[str, Any], kept: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs of a batch under the reference: kept before the first step, or as it is now if it moves."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled and trainer.precompute_ref_logps:
            return batch[REFERENCE_COLUMNS[0]], batch[REFERENCE_COLUMNS[1]]
        if trainer.is_deepspeed_enabled or trainer.args.sync_ref_model:
            return trainer.compute_ref_log_probs(trainer._reference, batch)
        return kept["chosen"], kept["rejected"]

    def _columns(self, policy: SequenceLogps, ref_chosen: Tensor, ref_rejected: Tensor) -> dict[str, Tensor]:
        numbers = (
            policy.chosen, policy.rejected, ref_chosen, ref_rejected, policy.chosen_length, policy.rejected_length
        )  # fmt: skip
        columns = dict(zip(FIELDS, numbers, strict=True))
        return columns if policy.kl is None else columns | dict(zip(KL_FIELDS, policy.kl.chunk(2), strict=True))

    def _compared(self, found: dict[str, np.ndarray], losses: PairLosses) -> dict[str, np.ndarray]:
        """The loss of every pair where it depends on the others: those are all held-out pairs."""
        columns = {name: torch.from_numpy(found[name]) for name in FIELDS}
        names = dict(zip(FIELDS, ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_length",
                                  "rejected_length"), strict=True))  # fmt: skip
        logps = PairLogps(**{names[name]: column for name, column in columns.items()})
        numbers = {
            name: torch.tensor(self.table[name], dtype=torch.float64)
            for name in ("weight", "margin", "trust")
            if name in self.table.column_names
        }
        with torch.no_grad():
            losses_of = losses(None, logps, numbers, step=0, training=False)  # type: ignore[arg-type]
        return {name: column.numpy() for name, column in _weighted(*losses_of, numbers.get("weight")).items()}

    def _losses(self) -> PairLosses:
        """The losses of the training with its running statistics, for pairs that no other process has."""
        trainer = self.trainer
        made = PairLosses(
            trainer.loss, trainer.token_mask, partial(trainer.run_reference, metrics=True), defaultdict(list),
            vocabulary=base_model(trainer.model).get_output_embeddings().weight.shape[0], gather=lambda values: values,
            rank=0, seed=trainer.args.seed,
        )  # fmt: skip
        made.load_state_dict(trainer.pair_losses.state_dict())
        return made

    def _states(self, states: Tensor) -> ReferenceStates:
        """The reference at the places of a batch, from its states there."""
        reference = base_model(self.trainer._reference)
        if self._head is None:
            self._head = _head_of(reference)
            if (file := self.folder / HEAD).exists():
                weights = self._read(file)
                vocabulary, width = weights["weight"].shape
                self._head = nn.Linear(width, vocabulary, bias="bias" in weights, device="meta")
                self._head.load_state_dict(weights, assign=True)
        return ReferenceStates(states, self._head, LogitForm.of(reference.config))

    @contextmanager
    def _reference(self) -> "Iterator[nn.Module]":
        trainer = self.trainer
        checkpointing = trainer.args.gradient_checkpointing_kwargs
        model = trainer.ref_model if trainer.ref_model is not None else trainer.model
        training = model.training
        model.eval()
        with reference_model(trainer.model, trainer.ref_model, trainer.accelerator, checkpointing) as reference:
            yield reference
        model.train(training)

    def _changes(self, head: nn.Module) -> bool:
        """Whether training changes what is now the head of the reference, or an adapter is part of it."""
        if self.trainer.ref_model is not None:
            return self.trainer.args.sync_ref_model
        return type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters())

    def _with_kl(self) -> list[int]:
        """Rows whose KL is computed: all, or a random part of them within ``STATES_BYTES``."""
        width = 4 * base_model(self.trainer.model).config.get_text_config().hidden_size
        order = np.random.default_rng(0).permutation(len(self.table))
        used = np.cumsum([sum(self._lengths[k][1:]) * width for k in order.tolist()])
        return sorted(order[: max(1, int(np.searchsorted(used, STATES_BYTES, side="right")))].tolist())

    def _batches(self, rows: list[int]) -> list[list[int]]:
        """Batches of rows of similar length, within ``per_device_eval_batch_size`` and the budget of tokens."""
        packed = self.trainer.layout == "shared_prefix"
        lengths = [self._lengths[k] for k in rows]
        tokens = [sum(one) if packed else 2 * (one[0] + max(one[1:])) for one in lengths]
        budget = self.trainer.max_tokens or max(1, sum(tokens))
        size = self.trainer.args.eval_batch_size
        found = token_batches(tokens, budget, padded=not packed)
        return [[rows[k] for k in part[at : at + size]] for part in found for at in range(0, len(part), size)]

    def _batch(self, rows: list[int]) -> dict[str, Any]:
        batch = self.trainer.data_collator([self.table[k] for k in rows])
        return {name: value.to(self.trainer.accelerator.device) for name, value in batch.items()}

    def _file(self, k: int) -> Path:
        return self.folder / f"batch-{k}.safetensors"

    def _read(self, file: Path) -> dict[str, Tensor]:
        return {name: value.to(self.trainer.accelerator.device) for name, value in load_file(file).items()}

    def _save(self, file: Path, tensors: dict[str, Tensor]) -> None:
        with atomic_write(file) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, str(temporary))


def _head_of(model: nn.Module) -> nn.Module:
    head: nn.Module = base_model(model).get_output_embeddings()
    return head


def _weighted(losses: Tensor, terms: dict[str, Tensor], weight: Tensor | None) -> dict[str, Tensor]:
    scale = 1.0 if weight is None else weight
    return {"loss": scale * losses} | {f"loss/{name}": scale * values for name, values in terms.items()}
