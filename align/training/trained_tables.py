"""The tables that a PreferenceTrainer trains and evaluates on, from those that it is given."""

import sys
from typing import Any

from datasets import Dataset, IterableDataset

from align.config import LossSection
from align.data.table_facts import table_facts
from align.data.training_pairs import report_in_sample
from align.distributed import process_rank
from align.losses.registry import BoundLoss
from align.models.template_arguments import different_arguments
from align.training.columns import prepare_pairs, require_margin
from align.training.finite_guard import number_rows
from align.training.pair_tables import as_table, stream_table, tables_of, tokenize_table
from align.training.preference_config import PreferenceConfig
from align.training.reference_passes import ReferencePasses
from align.training.trainer_inputs import check_stream, has_tokenizer, streamed_pairs

BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Sampling strategies that read the length of each pair."""


class TrainedTables(ReferencePasses):
    """A trainer whose tables may be of any kind in memory, and get their margins and weights from the settings."""

    _given_loss: BoundLoss
    """The loss as it was asked for; ``madpo`` becomes a weight column and ``dpo``."""
    _section: LossSection
    _ids: list[str]
    """Id of the pair in each row of the training table."""
    _template_arguments: set[str]
    """The ``different_arguments`` of the chat template in the training table."""

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
                require_margin(table, self._given_loss)
        return train, held_out

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """The tokenized pairs of a table that a training or an evaluation reads, with their margins and weights.

        Pairs that ``tokenize_table`` leaves out do not count for the mean of the weights. From a stream, as many
        pairs are taken as ``max_steps`` steps train on.
        """
        has_tokenizer(processing_class)
        training = dataset_name == "train" and not self._ids
        ids: list[str] = self._ids if training else []

        def tokenized(part: Dataset, _: str = "") -> Dataset:
            numbered, names = number_rows(part, len(ids))
            ids.extend(names)
            if training:
                self._template_arguments |= different_arguments(part)
            return tokenize_table(numbered, processing_class, args, ids, args.turns)

        table = as_table(dataset, f"{dataset_name}_dataset")
        if isinstance(table, IterableDataset):
            table = stream_table(table, streamed_pairs(args) if training else sys.maxsize, tokenized)
        else:
            require_margin(table, self._given_loss)
            if training:
                self.data_facts = table_facts(table)
            table = tokenized(table)
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
