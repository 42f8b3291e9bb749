"""Pairs -> the table that RewardTrainer reads: token ids, lengths and the columns of the objective."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import trl
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, TaskType
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from align.config.columns import WEIGHT
from align.data.in_memory import checked_table
from align.data.thumbs import are_thumbs
from align.errors import ConfigError, DataError, ModelError, python_words
from align.io.arrow_tables import as_dataset
from align.io.console import log
from align.models.folders import TEXT_PAIR, loading
from align.training.pair_tables import stream_table
from align.training.trainer_inputs import check_stream, has_tokenizer, streamed_pairs
from reward_models.arguments import as_reward_config
from reward_models.covariates import column_of, covariate_values
from reward_models.loading import (
    fitting_length,
    load_reward_model,
    note_text_pair,
    pad_as_trained,
    reads_text_pairs,
    takes_segments,
)
from reward_models.pair_weights import pair_weights
from reward_models.registry import BoundObjective, bind_objective, objective_columns
from reward_models.tokenization import pair_tokens, second_starts, told_apart

SEGMENTS = ("chosen_second", "rejected_second")
"""Columns of sentence pairs: where the second text of each response's token ids begins."""

UNBOUNDED = 1_000_000
"""Tokens that no text has: nothing is truncated."""

WITHOUT_EFFECT = {
    "data_collator": "a batch holds the columns that the objective reads",
    "quantization_config": "a reward model is loaded in float32; give a model that is loaded",
}
"""Arguments of trl.RewardTrainer that are refused -> why."""


class Prepared(NamedTuple):
    """The pairs that a reward model can tell apart, M of N."""

    table: Dataset
    """``id``, ``chosen_ids``, ``rejected_ids``, the columns of the objective, the length of each pair; of sentence
    pairs also ``SEGMENTS``. [M]"""
    pairs: Dataset
    """The pairs themselves, [M]."""


def prepare_pairs(
    pairs: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: BoundObjective,
    *,
    max_length: int,
    length_column: str,
    covariates: Sequence[str] = (),
) -> Prepared:
    """Tokenize pairs as a reward model reads them; leave out those whose responses are equal after truncation.

    Args:
        pairs: pair table with the columns that the objective reads.
        model: the model to train; its configuration says how it reads.
        tokenizer: the model's.
        objective: the loss.
        max_length: tokens per text; longer ones are truncated on the right.
        length_column: name of the column with the length of the longer response in tokens.
        covariates: names of the covariates of a training, see ``covariate_values``.

    Raises:
        AlignError: the pairs cannot be used.
    """
    columns = objective_columns(pairs, objective)
    length = fitting_length(model, max_length)
    tokens = pair_tokens(pairs, tokenizer, length, text_pair=getattr(model.config, TEXT_PAIR, False))
    kept = told_apart(pairs, tokens.alike & ~are_thumbs(pairs), length)
    if len(kept) < len(pairs):
        pairs, tokens = pairs.select(kept), tokens.of(kept)
        columns = objective_columns(pairs, objective)
    sides = tokens.chosen, tokens.rejected
    lengths = np.maximum(*(side.lengths() for side in sides))
    if takes_segments(model) and any(side.segmented for side in sides):
        columns |= dict(zip(SEGMENTS, map(second_starts, sides), strict=True))
    columns |= training_columns(pairs, objective, covariates)
    names = pairs["id"] if "id" in pairs.column_names else range(len(pairs))
    others = Dataset.from_dict({"id": [str(name) for name in names], **columns, length_column: lengths})
    ids = dict(zip(("chosen_ids", "rejected_ids"), (side.arrow() for side in sides), strict=True))
    return Prepared(concatenate_datasets([others, as_dataset(pa.table(ids))], axis=1), pairs)


def training_columns(pairs: Dataset, objective: BoundObjective, covariates: Sequence[str]) -> dict[str, list[float]]:
    """Column ``WEIGHT`` of pairs with weights that the objective does not read itself, and those of the covariates.

    Raises:
        ConfigError: covariates of an objective that reads no labels, or compares pairs with each other.
        DataError: see ``pair_weights`` and ``covariate_values``.
    """
    if covariates and (objective.spec.coupled or not objective.spec.reads_labels):
        raise ConfigError(
            f"covariates: found {', '.join(covariates)} with the objective {objective.spec.name}, which has no "
            "label of a single pair to explain",
            code="reward-covariate",
            hint="use the objective bradley_terry, or leave the covariates out",
        )
    weights = None if WEIGHT in objective.columns else pair_weights(pairs)
    found = {} if weights is None else {WEIGHT: weights.tolist()}
    values = covariate_values(pairs, covariates)
    return found | {column_of(k): values[:, k].tolist() for k in range(len(covariates))}


@dataclass(frozen=True, slots=True)
class TrainerInputs:
    """The arguments of RewardTrainer, checked, with the model loaded and the pairs tokenized."""

    model: Any
    args: trl.RewardConfig
    train: Dataset
    """See ``Prepared.table``."""
    pairs: Dataset | None
    """The pairs of ``train``; None if they came tokenized."""
    evaluation: Any
    """None, a table as ``train``, or a dictionary of such."""
    tokenizer: PreTrainedTokenizerBase | None
    peft_config: Any
    objective: BoundObjective

    @classmethod
    def read(
        cls,
        model: Any,
        args: trl.RewardConfig | None,
        train_dataset: Any,
        eval_dataset: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        peft_config: Any,
        objective: str | Callable[..., Tensor] | BoundObjective,
    ) -> "TrainerInputs":
        """Check the arguments in the order of their cost: names first, then the pairs, then the model.

        Raises:
            AlignError: see ``RewardTrainer``.
        """
        args, peft_config = as_reward_config(args, _name(model)), with_head(peft_config)
        if tokenizer is not None:
            has_tokenizer(tokenizer)
        with python_words():
            bound = bind_objective(objective, getattr(args, "objective_kwargs", None) or {})
            if train_dataset is None:
                raise DataError("train_dataset: found None, expected pairs", code="data-type")
            if is_tokenized(train_dataset):
                return cls(model, args, train_dataset, None, eval_dataset, tokenizer, peft_config, bound)
            stream = isinstance(train_dataset, IterableDataset)
            if stream:
                check_stream(args)
                args = copy.copy(args)
                args.train_sampling_strategy = "sequential"  # the order of the stream
            else:
                train = checked_table(train_dataset, "train_dataset", thumbs=True)
                objective_columns(train, bound)
            held = _tables(eval_dataset)
            set_seed(args.seed)
            model, tokenizer = _loaded(model, tokenizer, args)
            length = UNBOUNDED if args.max_length is None else args.max_length

            def prepared(table: Dataset, covariates: Sequence[str] = ()) -> Prepared:
                return prepare_pairs(
                    table, model, tokenizer, bound, max_length=length, length_column=args.length_column_name,
                    covariates=covariates,
                )  # fmt: skip

            if stream:
                train = stream_table(
                    train_dataset,
                    streamed_pairs(args),
                    lambda part, name: prepared(checked_table(part, name, thumbs=True)).pairs,
                )
            made = prepared(train, getattr(args, "covariates", None) or ())
            _warn_of_margin(made.pairs, bound)
            others = {name: prepared(one).table for name, one in held.items()}
        evaluation = others if isinstance(eval_dataset, dict) else others.get("eval_dataset")
        return cls(model, args, made.table, made.pairs, evaluation, tokenizer, peft_config, bound)


def _warn_of_margin(pairs: Dataset, objective: BoundObjective) -> None:
    if objective.spec.name == "bradley_terry" and "margin" in pairs.column_names:
        log.warning(
            "train_dataset: the objective bradley_terry does not read `margin`, which trl's trainer would; to "
            'learn from it: objective="bradley_terry_margin", with the column as teacher_margin'
        )


def refuse_without_effect(**arguments: Any) -> None:
    """Check that no argument is given that the trainer cannot obey.

    Raises:
        ConfigError: one is.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(
                f"{name}: found {type(value).__name__}, which has no effect here: {WITHOUT_EFFECT[name]}",
                code="trainer-key",
                hint="leave it out",
            )


def is_tokenized(table: Any) -> bool:
    """Whether a table has the token ids of both responses already, as trl takes them."""
    return isinstance(table, Dataset) and {"chosen_ids", "rejected_ids"} <= set(table.column_names)


def _tables(given: Any) -> dict[str, Dataset]:
    """The held-out pairs by name."""
    if given is None:
        return {}
    named = given if isinstance(given, dict) else {"eval_dataset": given}
    return {
        name: held_out_table(table, name if table is given else f"eval_dataset[{name!r}]")
        for name, table in named.items()
    }


def held_out_table(given: Any, name: str) -> Dataset:
    """The pairs of an evaluation, checked; a stream is read to its end.

    Raises:
        DataError: see ``align.pairs_from_dataset``.
    """
    return checked_table(list(given) if isinstance(given, IterableDataset) else given, name, thumbs=True)


def _name(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or "reward-model")


def _loaded(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, args: trl.RewardConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its tokenizer; its configuration says how it is trained to read."""
    if isinstance(model, str):
        kwargs = {name: value for name, value in (args.model_init_kwargs or {}).items() if value is not None}
        model, own = load_reward_model(
            model,
            dtype=str(kwargs.get("dtype", "float32")).removeprefix("torch."),
            trust_remote_code=bool(kwargs.get("trust_remote_code", args.trust_remote_code)),
            new_head=True,
            revision=kwargs.get("revision"),
            attention=kwargs.get("attn_implementation"),
        )
        tokenizer = own if tokenizer is None else tokenizer
    if not hasattr(model, "config"):
        raise ConfigError(
            f"model: found a {type(model).__name__}, expected a folder, a hub id or a model with one output",
            code="config-option",
        )
    if tokenizer is None:
        name = getattr(model, "name_or_path", "")
        if not name:
            raise ModelError(
                "processing_class: found None, and a model that does not say where it comes from, expected a tokenizer",
                code="model-tokenizer",
                hint="give processing_class=tokenizer",
            )
        with loading(name, "no tokenizer can be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    for name in ("eos_token", "pad_token"):
        _set_token(tokenizer, name, getattr(args, name, None))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad_as_trained(model, tokenizer)
    note_text_pair(model, reads_text_pairs(model, asked=False))
    return model, tokenizer


def _set_token(tokenizer: PreTrainedTokenizerBase, name: str, token: str | None) -> None:
    """Let the tokenizer end or pad texts with another of its tokens; it is saved with the model.

    Raises:
        ConfigError: it has no such token.
    """
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise ConfigError(
            f"RewardConfig.{name}: found {token!r}, which is no token of the model's tokenizer", code="trainer-key"
        )
    setattr(tokenizer, name, token)


def with_head(config: Any) -> Any:
    """The adapter's configuration with the head among what is trained and saved.

    Raises:
        ConfigError: it is none, or its task type leaves a head untrained that was drawn at random.
    """
    if config is not None and not isinstance(config, PeftConfig):
        raise ConfigError(
            f"peft_config: found {type(config).__name__}, expected a peft.PeftConfig, such as peft.LoraConfig",
            code="peft-key",
        )
    if config is None or config.task_type == TaskType.SEQ_CLS or getattr(config, "modules_to_save", None):
        return config
    if config.task_type is not None:
        raise ConfigError(
            f"peft_config.task_type: found {config.task_type}, under which the head of the reward model would not be "
            "trained; expected SEQ_CLS",
            code="peft-key",
            hint='LoraConfig(task_type="SEQ_CLS"), or name the head in modules_to_save',
        )
    return replace(config, task_type=TaskType.SEQ_CLS)
