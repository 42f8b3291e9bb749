"""The tables that a PreferenceTrainer trains and evaluates on, from those that it is given."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.trainer_utils import PredictionOutput

from align.config import LossSection
from align.config.columns import REFERENCE_COLUMNS
from align.data.findings import report_margins
from align.data.table_facts import table_facts
from align.data.thumbs import unpaired
from align.data.training_pairs import report_in_sample
from align.distributed import process_rank
from align.errors import ConfigError
from align.losses.registry import BoundLoss
from align.models.layout import has_adapter
from align.models.template_arguments import different_arguments
from align.training.base.argument_types import check_named_table
from align.training.columns import prepare_pairs, require_margin
from align.training.finite_guard import number_rows
from align.training.pair_tables import as_table, stream_table, tables_of, tokenize_table
from align.training.preference_config import PreferenceConfig
from align.training.reference_passes import ReferencePasses
from align.training.single_responses import check_kind, rows_per_step, single_responses
from align.training.trainer_inputs import check_stream, has_tokenizer, streamed_pairs

BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Sampling strategies that read the length of each pair."""
TOKENS = {"prompt_ids", "chosen_ids", "rejected_ids"}
"""Columns of a table that a trainer has prepared."""


class TrainedTables(ReferencePasses):
    """A trainer whose tables may be of any kind in memory, and get their margins and weights from the settings."""

    _given_loss: BoundLoss
    """The loss as it was asked for; ``madpo`` becomes a weight column and ``dpo``."""
    _section: LossSection
    _ids: list[str]
    """Id of the pair in each row of the training table."""
    _template_arguments: set[str]
    """The ``different_arguments`` of the chat template in the training table."""
    _words: Callable[[], AbstractContextManager[None]]
    """Whose words errors use: those of a run file or of Python."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, see ``ReliableTrainer.train``; errors name fields of PreferenceConfig."""
        with self._words():
            return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as trl does, on a table of any kind that ``eval_dataset`` may be, or on one of its dict by name.

        Raises:
            ConfigError: there is no table of that name, or see ``_check_reference_left``.
        """
        with self._words():
            if isinstance(eval_dataset, str):
                check_named_table(self.eval_dataset, eval_dataset)
            elif eval_dataset is not None:
                self._check_reference_left("eval_dataset")
            found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return found

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict as transformers does, on one table of any kind that ``eval_dataset`` may be.

        Raises:
            ConfigError: see ``_check_reference_left``.
            DataError: it is no table of pairs.
        """
        with self._words():
            table = test_dataset
            if not isinstance(table, Dataset) or not set(table.column_names) >= TOKENS:
                table = self._prepare_dataset(table, self.processing_class, self.args, "test")
            precomputed = self.precompute_ref_logps and self.reads_reference
            if precomputed and not set(REFERENCE_COLUMNS) <= set(table.column_names):
                self._check_reference_left("test_dataset")
                size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
                table = self._precompute_ref_logps(table, "test", size)
            found: PredictionOutput = super().predict(table, ignore_keys, metric_key_prefix)
            return found

    def _check_reference_left(self, name: str) -> None:
        """Raise if a new table needs log-probs of a reference that this training has changed.

        Raises:
            ConfigError: they were precomputed by the model itself, all of whose weights have been trained since.
        """
        gone = self.ref_model is None and not has_adapter(self.model) and self.state.global_step > 0
        if self.precompute_ref_logps and gone:
            raise ConfigError(
                f"{name}: found a new table after {self.state.global_step} steps, and the reference of "
                "precompute_ref_log_probs=True was the model before them",
                code="trainer-key",
                hint="give the table as eval_dataset when the trainer is made, a ref_model, or "
                "precompute_ref_log_probs=False",
            )

    def _tables(self, train: Any, held_out: Any, config: PreferenceConfig) -> tuple[Any, Any]:
        """The given tables as datasets, checked as far as that needs no model."""
        train, held_out = as_table(train, "train_dataset"), tables_of(held_out, "eval_dataset")
        if isinstance(train, IterableDataset):
            check_stream(config)
            config.train_sampling_strategy = "sequential"  # the order of the stream
        elif process_rank() == 0:
            report_in_sample(train, "train_dataset")
        for table in (train, *(held_out.values() if isinstance(held_out, dict) else [held_out])):
            if isinstance(table, Dataset):
                check_kind(table, self._given_loss, "train_dataset" if table is train else "eval_dataset")
                require_margin(table, self._given_loss)
        if isinstance(train, Dataset) and self._given_loss.spec.needs_margin and process_rank() == 0:
            report_margins(train, "train_dataset")
        return train, held_out

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """The tokenized pairs of a table that a training or an evaluation reads, with their margins and weights.

        Pairs that ``tokenize_table`` leaves out do not count for the mean of the weights. From a stream, as many
        pairs are taken as ``max_steps`` steps train on.
        """
        has_tokenizer(processing_class)
        training = dataset_name == "train" and not self._ids
        ids: list[str] = self._ids if training else []
        single = self._given_loss.spec.unpaired

        def tokenized(part: Dataset, _: str = "") -> Dataset:
            check_kind(part, self._given_loss, f"{dataset_name}_dataset")
            part = unpaired(part) if single else part
            numbered, names = number_rows(part, len(ids))
            ids.extend(names)
            if training:
                self._template_arguments |= different_arguments(part)
            return tokenize_table(numbered, processing_class, args, ids, args.turns, single=single)

        table = as_table(dataset, f"{dataset_name}_dataset")
        if isinstance(table, IterableDataset):
            table = stream_table(table, streamed_pairs(args) if training else sys.maxsize, tokenized)
        else:
            require_margin(table, self._given_loss)
            if training:
                self.data_facts = table_facts(table)
            table = tokenized(table)
        if single:
            table = single_responses(table, self._given_loss, rows_per_step(args))
        return prepare_pairs(table, self._section.weights, self._given_loss)[0]

    def _add_lengths(self) -> None:
        """Add the column of lengths to the training table if batches are made by them."""
        if self.args.train_sampling_strategy in BY_LENGTH:
            lengths = _lengths(self.train_dataset)
            self.train_dataset = self.train_dataset.add_column(self.args.length_column_name, lengths)


def _lengths(dataset: Dataset) -> list[int]:
    """Tokens of the prompt with the longer response, for each pair."""
    columns = zip(dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in columns]
