"""RewardTrainer: trl's RewardTrainer under any objective of the registry."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.config import SharpnessSection, TiltSection
from align.config.columns import NAMES, THUMB, WEIGHT
from align.data.table_facts import table_facts
from align.data.training_pairs import record_of, write_digests
from align.errors import python_words
from align.io.files import read_json, write_json
from align.losses.pair_weights import LossTilt
from align.models.collator import REAL, counted, only_real
from align.training.base.argument_types import (
    check_arguments,
    check_function,
    check_named_table,
    check_optimizer_class,
)
from align.training.base.arguments import refusals
from align.training.base.trainer import ReliableTrainer
from align.training.trainer_inputs import without_ignored_kwargs
from reward_models.arguments import read_section
from reward_models.covariates import Coefficients, column_of
from reward_models.objectives import thumb_gap
from reward_models.preparation import (
    SEGMENTS,
    UNBOUNDED,
    TrainerInputs,
    held_out_table,
    is_tokenized,
    prepare_pairs,
    refuse_without_effect,
)
from reward_models.registry import BoundObjective
from reward_models.sharpness import SharpnessPenalty
from reward_models.step_loss import StepLoss
from reward_models.tie_parameter import TieParameter
from reward_models.token_rows import PairNames
from reward_models.tokenization import segments

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of the model in a batch; token type ids of sentence pairs only."""
PENALTY_STATE = "sharpness.json"
TIE_STATE = "tie_state.json"
COVARIATE_STATE = "covariate_state.json"
COVARIATES = "covariates"
"""Key of a batch: the covariates [B, C]."""


@dataclass
class ObjectiveCollator(DataCollatorForPreference):
    """trl's collator plus one number [B] per pair from each of ``columns``: int64 for names, else float32."""

    columns: tuple[str, ...] = ()
    covariates: int = 0
    """Number of covariates, which become one tensor [B, C]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``; see the class."""
        batch: dict[str, Any] = super().torch_call(examples)
        if SEGMENTS[0] in examples[0]:
            starts = [example[name] for name in SEGMENTS for example in examples]
            batch["token_type_ids"] = segments(batch["attention_mask"], starts)
        for name in self.columns:
            dtype = torch.int64 if name in NAMES else torch.float32
            batch[name] = torch.tensor([example[name] for example in examples], dtype=dtype)
        if WEIGHT in examples[0]:
            batch[WEIGHT] = torch.tensor([example[WEIGHT] for example in examples], dtype=torch.float32)
        names = [column_of(k) for k in range(self.covariates)]
        if names and names[0] in examples[0]:
            batch[COVARIATES] = torch.tensor([[example[name] for name in names] for example in examples])
        return batch


class RewardTrainer(ReliableTrainer, trl.RewardTrainer):
    """trl's RewardTrainer with any objective; with Bradley-Terry its losses and weights are trl's to the bit.

    The loss of a step is the mean of the objective over its pairs, however they are split into micro-batches and over
    processes; duplicates that only fill the last batch (``WholeEpochs``) are left out. trl's
    ``center_rewards_coefficient`` is added to any objective. An objective whose pairs depend on each other sees the
    pairs of all processes in one forward pass. ``ReliableTrainer`` lists what else is added.

    Pairs become token ids as scoring reads them, before trl sees them; pairs whose responses are equal after truncation
    to ``args.max_length`` are left out, and their number is logged. A saved model and each checkpoint hold the record
    of the training pairs, from which ``RewardModel.score_pairs`` tells in-sample rows. Unlike trl, a column ``margin``
    is not read unless the objective names it.

    Args:
        model: as in trl: folder or hub id of a backbone, which gets a head of one logit drawn under ``args.seed``; or a
            model or PeftModel for sequence classification with one output.
        args: ``RewardConfig`` or ``trl.RewardConfig``; None: the defaults of ``RewardConfig``.
        train_dataset: what ``align.pairs_from_dataset`` takes, with the columns that the objective reads; or a Dataset
            with ``chosen_ids`` and ``rejected_ids``; or an IterableDataset, of which the first pairs that fill
            ``args.max_steps`` steps are trained on, in their order.
        eval_dataset: the same, or a dictionary of such.
        processing_class: tokenizer; None: the model's.
        peft_config: of task type SEQ_CLS, so that the head is trained and saved.
        objective: name in ``OBJECTIVES``; a function (reward_chosen [B], reward_rejected [B], *columns [B]) -> [B],
            see ``own_objective``; or a bound objective.
        tilt: weights of the pairs from their losses; None: ``args.tilt``.
        sharpness: a penalty whose gradient is added after each backward pass; None: ``args.sharpness``.
        covariates: names of the covariates that a tokenized ``train_dataset`` has; empty: ``args.covariates``.
        data_collator, quantization_config: refused.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as in trl.

    Raises:
        ConfigError: the objective, its parameters or another argument cannot be used.
        DataError: the pairs cannot be used, or lack a column of the objective.
        ModelError: the model cannot be loaded as a reward model.
    """

    data_collator: Any
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: trl.RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        objective: str | Callable[..., Tensor] | BoundObjective = "bradley_terry",
        tilt: TiltSection | None = None,
        sharpness: SharpnessSection | None = None,
        covariates: Sequence[str] = (),
    ) -> None:
        refuse_without_effect(data_collator=data_collator, quantization_config=quantization_config)
        check_arguments(callbacks, optimizers, compute_metrics, type(self).__name__)
        check_optimizer_class(optimizer_cls_and_kwargs, optimizers)
        check_function(preprocess_logits_for_metrics, "preprocess_logits_for_metrics", "of logits and labels")
        model = str(model) if isinstance(model, Path) else model
        inputs = TrainerInputs.read(model, args, train_dataset, eval_dataset, processing_class, peft_config, objective)
        self.objective = inputs.objective
        self._names = PairNames(inputs.train)
        self._pairs = inputs.pairs
        self.data_facts = None if inputs.pairs is None else table_facts(inputs.pairs)
        applied = without_ignored_kwargs(trl.RewardTrainer) if isinstance(model, str) else nullcontext()
        with refusals("RewardTrainer") if inputs.pairs is not None else nullcontext(), applied:
            super().__init__(
                model=inputs.model, args=inputs.args, train_dataset=inputs.train, eval_dataset=inputs.evaluation,
                processing_class=inputs.tokenizer, compute_metrics=compute_metrics, callbacks=callbacks,
                optimizers=optimizers, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics, peft_config=inputs.peft_config,
            )  # fmt: skip
        tilt = tilt or read_section(TiltSection, getattr(self.args, "tilt", None), "tilt")
        sharpness = sharpness or read_section(SharpnessSection, getattr(self.args, "sharpness", None), "sharpness")
        self.async_checkpoints = getattr(self.args, "async_checkpoints", False)
        gather, rank = self.accelerator.gather, self.accelerator.process_index
        names = tuple(covariates or getattr(self.args, "covariates", None) or ())
        self.step_loss = StepLoss(
            self.objective,
            tilt=None if tilt is None else LossTilt(tilt, gather, rank),
            centering=self.args.center_rewards_coefficient,
            gather=gather,
            rank=rank,
            processes=self.accelerator.num_processes,
            ties=TieParameter(self.objective, gather) if "rate" in self.objective.parameters else None,
            covariates=Coefficients(names, gather) if names else None,
        )
        self.penalty = None
        if sharpness is not None:
            reduce = partial(self.accelerator.reduce, reduction="mean")
            self.penalty = SharpnessPenalty(sharpness, self.accelerator.unwrap_model(self.model), reduce)
        self.data_collator = self._own_collator(len(names))

    def _own_collator(self, covariates: int) -> ObjectiveCollator:
        """trl's collator with what the objective reads and this number of covariates."""
        return ObjectiveCollator(
            pad_token_id=self.data_collator.pad_token_id,
            pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
            columns=self.objective.columns,
            covariates=covariates,
        )

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Length of each pair, what the objective and the weights read, where second texts of sentence pairs begin."""
        covariates = [column_of(k) for k in range(self.data_collator.covariates)]
        return (*super().extra_columns, *self.objective.columns, *SEGMENTS, WEIGHT, *covariates)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as trl does, on tables that are tokenized and truncated as those given to the trainer.

        Args:
            eval_dataset: what the trainer takes as ``eval_dataset``, or the name of one in its dict of them.
            ignore_keys: as in trl.
            metric_key_prefix: as in trl.

        Raises:
            AlignError: there is no table of that name, or its pairs cannot be used.
        """
        if isinstance(eval_dataset, str):
            check_named_table(self.eval_dataset, eval_dataset)
        elif isinstance(eval_dataset, dict):
            eval_dataset = {key: self._prepared(table, f"eval_dataset[{key!r}]") for key, table in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return found

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict as trl does, on one table of a kind that ``evaluate`` takes.

        Raises:
            AlignError: its pairs cannot be used.
        """
        prepared = self._prepared(test_dataset, "test_dataset")
        found: PredictionOutput = super().predict(prepared, ignore_keys, metric_key_prefix)
        return found

    def _prepared(self, table: Any, name: str) -> Dataset:
        """The tokenized pairs of a table, as those of the trainer's own tables."""
        if is_tokenized(table):
            return table
        model, args = self.accelerator.unwrap_model(self.model), self.args
        with python_words():
            return prepare_pairs(
                held_out_table(table, name),
                model.get_base_model() if isinstance(model, PeftModel) else model,
                self.processing_class,
                self.objective,
                max_length=UNBOUNDED if args.max_length is None else args.max_length,
                length_column=args.length_column_name,
            ).table

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean of the objective over the pairs of ``inputs``, times their share of the step's pairs.

        trl's metrics are logged for any objective; they include duplicates that only fill the last batch.

        Raises:
            NumericsError: a reward of a pair is not finite.
        """
        columns = {name: inputs[name] for name in self.objective.columns}
        own = {REAL, WEIGHT, COVARIATES, *columns}
        batch = {name: value for name, value in inputs.items() if name not in own}
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        training, real = self.model.training, inputs.get(REAL)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        if THUMB in columns:
            self._log_thumbs(thumb_gap(chosen.detach(), rejected.detach(), columns[THUMB]), inputs.get(REAL))
        if training:
            self._check_rewards(inputs, chosen.detach(), rejected.detach())
        weights = inputs.get(WEIGHT) if training and WEIGHT not in columns else None
        z = inputs.get(COVARIATES) if training else None
        plain = self.objective.spec.name == "bradley_terry" and weights is None and z is None
        if not plain or self.step_loss.tilt is not None or real is not None:
            step = self.state.global_step if training else None
            loss, share = self.step_loss(chosen, rejected, columns, real, step=step, weights=weights, z=z)
            if share is not None:
                self._metrics["train"]["weight/ess_share"].append(share)
            if self.step_loss.ties is not None and training:
                self._metrics["train"]["tie"].append(self.step_loss.ties.value)
        if training and num_items_in_batch is not None:
            coupled, total = self.objective.spec.coupled, int(num_items_in_batch)
            pairs = self._count_all(inputs) if coupled else counted(inputs) * self.accelerator.num_processes
            loss = loss if pairs == total else loss * pairs / total
        return (loss, outputs) if return_outputs else loss

    def _log_thumbs(self, gap: Tensor, real: Tensor | None) -> None:
        """Log for the rows [B] of a batch whether each is on the right side, in place of trl's numbers of pairs."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        gap = only_real(gap, real)
        sums = torch.stack([(gap > 0).sum().to(gap), gap.sum(), gap.new_tensor(len(gap))])
        right, total, count = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        metrics["accuracy"][-1], metrics["margin"][-1] = right / max(count, 1), total / max(count, 1)

    def _check_rewards(self, inputs: dict[str, Any], chosen: Tensor, rejected: Tensor) -> None:
        """Record the pairs of the batch for the guard and stop at a reward [B] that is not finite."""
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = [row[:n] for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        half = len(chosen)
        ids = [self._names.of(*pair) for pair in zip(rows[:half], rows[half:], strict=True)]
        self.guard.pairs += [ids[k] for k in only_real(torch.arange(half), inputs.get(REAL)).tolist()]
        bad = (~(torch.isfinite(chosen) & torch.isfinite(rejected))).nonzero().flatten().tolist()
        if bad:
            rewards = f"reward of chosen {float(chosen[bad[0]])}, of rejected {float(rejected[bad[0]])}"
            self.guard.stop("loss", [ids[k] for k in bad], f"is not finite ({rewards})")

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor) -> Tensor:
        """Run trl's step, then add the gradient of the sharpness penalty if there is one."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.penalty is not None:
            batch = self._prepare_inputs({name: inputs[name] for name in MODEL_INPUTS if name in inputs})
            count, plain = self._count_all(inputs), self.penalty.model

            def mean_margin() -> Tensor:
                with self.compute_loss_context_manager():
                    chosen, rejected = plain(**batch, use_cache=False).logits.squeeze(-1).float().chunk(2)
                margins = only_real(chosen - rejected, inputs.get(REAL))
                return margins.sum() * (self.accelerator.num_processes / count)

            norm = self.penalty.add(mean_margin, count / int(num_items_in_batch))
            self._metrics["train"]["sharpness/norm"].append(norm)
            self._metrics["train"]["sharpness/multiplier"].append(self.penalty.multiplier)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model as trl does, and the record of its training pairs."""
        super()._save(output_dir, state_dict)
        if self._pairs is not None and self.args.should_save:
            write_digests(self._digests, Path(output_dir or self.args.output_dir))
        if self.step_loss.ties is not None and self.args.should_save:
            self.step_loss.ties.write(Path(output_dir or self.args.output_dir))
        if self.step_loss.covariates is not None and self.args.should_save:
            self.step_loss.covariates.write(Path(output_dir or self.args.output_dir))

    @cached_property
    def _digests(self) -> np.ndarray:
        """Record of the training pairs, and of those of the model that the training starts from."""
        assert self._pairs is not None
        return record_of(self._pairs, self.model.config.name_or_path)

    def save_extra_state(self, folder: Path) -> None:
        """Write the multiplier of the sharpness penalty and the state of the tie parameter."""
        if self.penalty is not None:
            write_json(folder / PENALTY_STATE, self.penalty.state_dict())
        if self.step_loss.ties is not None:
            write_json(folder / TIE_STATE, self.step_loss.ties.state_dict())
        if self.step_loss.covariates is not None:
            write_json(folder / COVARIATE_STATE, self.step_loss.covariates.state_dict())

    def load_extra_state(self, folder: Path) -> None:
        """Restore what ``save_extra_state`` wrote."""
        if self.penalty is not None and (folder / PENALTY_STATE).exists():
            self.penalty.load_state_dict(read_json(folder / PENALTY_STATE))
        if self.step_loss.ties is not None and (folder / TIE_STATE).exists():
            self.step_loss.ties.load_state_dict(read_json(folder / TIE_STATE))
        if self.step_loss.covariates is not None and (folder / COVARIATE_STATE).exists():
            self.step_loss.covariates.load_state_dict(read_json(folder / COVARIATE_STATE))

    def _count_all(self, inputs: dict[str, Any]) -> int:
        """Count the real pairs of this batch over all processes."""
        local = torch.tensor([counted(inputs)], device=self.accelerator.device)
        return int(self.accelerator.gather(local).sum())
