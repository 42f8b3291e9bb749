"""Passes of the reference: its log-probs before a training or in each step, and the layout of all forward passes."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

from align.config.columns import PAIR_COLUMNS
from align.errors import ConfigError
from align.io.console import log
from align.models.adapter_folders import FIRST_ADAPTER
from align.models.adapters import copy_adapter, starts_from_adapter
from align.models.collator import REAL, ROW, PairCollator
from align.models.layout import LayoutChoice, base_model, choose_layout, longest_sequence
from align.models.logps import Layout, SequenceLogps, pair_logps
from align.models.positions import check_padding, check_positions, learned_positions
from align.training.base.trainer import ReliableTrainer
from align.training.reference import (
    add_reference_logps,
    cache_file,
    reference_model,
)

LAYOUT_SAMPLE = 256
"""Pairs of the sample on which the layout is chosen."""


class ReferencePasses(ReliableTrainer, DPOTrainer):
    """trl's DPOTrainer whose reference runs in the layout of the policy, over a token budget, with a cache on disk."""

    layout: Layout
    max_tokens: int | None
    """Tokens per forward pass; None: no limit."""
    reference_cache: Path | None
    """Folder that keeps reference log-probs between trainings."""
    _layout_choice: LayoutChoice | None
    _given_reference: bool
    _loaded_from: Path | None
    """Folder that the trainer has loaded the policy from; None if it was given a model."""
    reads_reference: bool
    """Whether anything in the training reads log-probs of the reference."""
    data_collator: Any

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add reference log-probs as columns, cached on disk, if they are read.

        Raises:
            ConfigError: those of a given reference under DeepSpeed.
        """
        self.data_collator = PairCollator.of(self.data_collator)  # trl's own does not know whose words count
        self._prepare_layout(dataset)
        self.reads_reference = self.reads_reference or self.is_deepspeed_enabled
        if not self.reads_reference:
            return dataset
        if self.is_deepspeed_enabled and self._given_reference:
            raise ConfigError(
                "ref_model: found a reference of its own together with DeepSpeed and precompute_ref_log_probs: true, "
                "expected precompute_ref_log_probs: false",
                code="train-deepspeed",
                hint="set it, so that the reference runs in each step, or train under FSDP2",
            )
        if self.is_deepspeed_enabled:
            self.model.to(self.accelerator.device)  # its engine would move it there only for the training
        return add_reference_logps(
            dataset,
            self._reference_of_examples,
            self.accelerator,
            batch_tokens=self.max_tokens,
            batch_pairs=self.args.precompute_ref_batch_size,
            file=None if self._given_reference and self.is_fsdp_enabled else self._cache_file(dataset),
            in_step=self.is_fsdp_enabled,
        )

    def add_reference(self) -> None:
        """Compute the reference log-probs of the training table for a loss without a reference, for what else reads
        them; before the first step."""
        if not self.reads_reference:
            self.reads_reference = True
            self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", 1)

    def _cache_file(self, dataset: Dataset) -> Path | None:
        given = self.ref_model if self._given_reference else None
        reference = None if given is None else self.accelerator.unwrap_model(given)
        return cache_file(self.reference_cache, self.model, dataset, self.args, reference, self._loaded_from)

    def _reference_of_examples(self, examples: list[dict[str, Any]]) -> Tensor:
        """Reference log-probs [B, 2] of collated examples."""
        batch = self.data_collator(examples)
        batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        return torch.stack(self.compute_ref_log_probs(self._reference, batch), dim=1)

    @property
    def _reference(self) -> torch.nn.Module:
        return self.ref_model if self.ref_model is not None else self.model

    def _prepare_layout(self, dataset: Dataset) -> None:
        """Choose the layout once, before the first forward pass.

        Raises:
            ConfigError: DeepSpeed loaded the model in parts, or the pairs do not fit the model's positions.
        """
        choice, self._layout_choice = self._layout_choice, None
        if choice is None:
            return
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ConfigError(
                "DeepSpeed: found a model that was loaded in parts, expected a whole one: layout, head and reference "
                "log-probs are tried on it before training",
                code="train-deepspeed",
                hint="give the model's folder or hub id",
            )
        if starts_from_adapter(self.model):
            copy_adapter(self.model, "default", FIRST_ADAPTER)  # trl copies only a part of some adapters
        sample = self.data_collator([dataset[k] for k in range(min(LAYOUT_SAMPLE, len(dataset)))])
        longest = longest_sequence(dataset, self.args.max_length)
        base = base_model(self.model)
        check_positions(base, longest, "the longest pair", "lower train.trainer.max_length")
        check_padding(learned_positions(base), longest, self.args.pad_to_multiple_of)
        if self.args.neftune_noise_alpha and choice == "auto":
            log.info("layout: concatenated (neftune_noise_alpha scales its noise by the length of a row)")
            choice = "concatenated"
        self.layout = choose_layout(self.model, sample, choice, longest=longest, training=True)
        if self.ref_model is not None:
            self._check_rows(self.ref_model)
            choice = choice if self.layout == "shared_prefix" else "concatenated"
            self.layout = choose_layout(self.ref_model, sample, choice, longest=longest)

    def _check_rows(self, reference: torch.nn.Module) -> None:
        """Refuse a reference that embeds fewer tokens than the tokenizer has.

        Raises:
            ConfigError: it is a model of another vocabulary.
        """
        rows, tokens = base_model(reference).config.get_text_config().vocab_size, len(self.processing_class)
        if rows < tokens:
            raise ConfigError(
                f"ref_model: embeds {rows} tokens, and the policy's tokenizer has {tokens}",
                code="train-reference",
                hint="take a reference with the policy's tokenizer",
            )

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs [B], [B] of the chosen and rejected responses under the reference, without gradient."""
        if self.is_deepspeed_enabled and self._given_reference:
            inputs = {name: value for name, value in inputs.items() if name not in (*PAIR_COLUMNS, ROW, REAL)}
            return super().compute_ref_log_probs(model, inputs)
        logps = self.run_reference(inputs)
        return logps.chosen, logps.rejected

    def run_reference(self, inputs: dict[str, Any], *, metrics: bool = False) -> SequenceLogps:
        """Scores of a batch under the reference, token by token, without gradient.

        Args:
            inputs: a batch.
            metrics: also entropy and the other scores besides the log-probs.
        """
        checkpointing = self.args.gradient_checkpointing_kwargs
        with reference_model(self.model, self.ref_model, self.accelerator, checkpointing) as reference:
            return pair_logps(reference, inputs, self.layout, metrics=metrics)
