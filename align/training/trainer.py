"""PreferenceTrainer: trl's DPOTrainer with the loss of a pair taken from align/losses and weighted per pair."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig

from align.config import TokenMaskSection
from align.config.columns import MASK_COLUMNS, PAIR_COLUMNS, THUMB
from align.errors import FROM_YAML, from_yaml, python_words
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.margin_weights import MADPO_TAU
from align.losses.pair_weights import LossTilt
from align.losses.pairwise import PairLogps, scale_gradient
from align.losses.registry import BoundLoss
from align.models.collator import REAL, ROW, PairCollator, only_real
from align.models.expert_balance import check_balanced
from align.models.layout import has_adapter
from align.models.logps import SequenceLogps, pair_logps
from align.models.template_arguments import write_record
from align.training.adapter_start import begin_adapter
from align.training.adapters import Use, check_given_adapter, check_started, head_adapter_allowed
from align.training.base.argument_types import check_arguments
from align.training.base.arguments import refusals
from align.training.base.settings import check_machine
from align.training.columns import trained_loss
from align.training.finite_guard import FiniteGuard
from align.training.gradient_remedy import GradientRemedy
from align.training.loss_choice import PairLoss, choose_loss, reads_reference
from align.training.metrics import PairMetrics, WeightTotals
from align.training.pair_losses import PairLosses, as_in_step
from align.training.preference_config import PreferenceConfig, check_own_fields, own_copy
from align.training.reference import load_reference, save_reference
from align.training.settings import check_training, refuse_precomputed_tokens, refuse_split_batches
from align.training.split_steps import SplitSteps
from align.training.tied_embedding import tied_embedding
from align.training.token_mask import TokenMask
from align.training.trainer_inputs import (
    check_kinds,
    check_tokenizer_found,
    collator_fields,
    default_output,
    finish_adapter,
    has_tokenizer,
    load_named,
    reference_of,
    starts_as_adapter,
    without_ignored_kwargs,
    without_model_hash,
)

LOSS_STATE = "loss_state.json"


class PreferenceTrainer(SplitSteps):
    """trl's DPOTrainer with any loss of ``align.LOSSES``, or one of your own, weighted pair by pair.

    The loss of an optimizer step is mean_i weight_i * loss_i over its pairs. The weight of a pair is the column
    ``weight`` of the table times what the loss and ``pair_weights`` give it, not normalized unless they say so. Data
    preparation, LoRA, checkpoints, logging and launchers are trl's; ``ReliableTrainer`` lists what is added.

    Args:
        model: folder or hub id, a model, or a PEFT model, whose adapter is then trained further.
        ref_model: the reference; None: the model as it is before training, or without its new adapter. trl reads the
            folder of a loaded model again, here it is copied with the changes made to it since.
        args: a PreferenceConfig, or trl's DPOConfig; it is copied, and ``self.args`` is the copy. None: defaults.
        data_collator: None, or trl's DataCollatorForPreference with settings of your own.
        train_dataset: trl's preference format with ``margin`` if the loss needs it and ``weight`` if pairs are
            weighted: Dataset, list of dicts or pandas.DataFrame; IterableDataset if ``args.max_steps`` is set.
        eval_dataset: one such table, or a dict of them.
        processing_class: tokenizer; None: that of the model.
        compute_metrics: as in trl.
        callbacks: as in trl.
        optimizers: as in trl.
        quantization_config: how a model given by name is quantized.
        peft_config: adapter to train; None: all weights.
        loss: name in ``align.LOSSES``, ``{"terms": {name: weight, ...}}`` for a sum, or a function of
            ``align.PairLogps`` and the margins [B] that returns one loss per pair [B] (of the log-probs alone, if it
            takes one argument). None: ``args`` say which.

    Raises:
        ConfigError: a field that has no meaning here or a value that it cannot have, two different losses or betas, a
            loss that needs margins and a table without them, a layout that is not exact for the model.
        DataError: a table that is not one of pairs, or of which no pair is left.
        ModelError: the model or its tokenizer cannot be used.
    """

    data_collator: Any
    guard: FiniteGuard
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        loss: str | dict[str, Any] | PairLoss | BoundLoss | None = None,
    ) -> None:
        model = str(model) if isinstance(model, Path) else model
        with python_words(), head_adapter_allowed():
            check_kinds(model, args, ref_model, peft_config)
            check_arguments(callbacks, optimizers, compute_metrics, type(self).__name__)
            check_machine(args)
            config = self._configure(model, args, loss, peft_config)
            train_dataset, eval_dataset = self._tables(train_dataset, eval_dataset, config)
            collate, named = collator_fields(data_collator), isinstance(model, str)
            if processing_class is not None:
                has_tokenizer(processing_class)
            elif not named:
                check_tokenizer_found(model)
            self._given_reference = ref_model is not None
            plain = named and quantization_config is None
            self._loaded_from = Path(model) if plain and Path(model).is_dir() else None
            if named:
                model, processing_class = load_named(model, config, processing_class, quantization_config, peft_config)
                quantization_config = None
            elif ref_model is None:
                ref_model = reference_of(model, config, peft_config)
            refused = nullcontext() if FROM_YAML.get() else refusals(type(self).__name__)
            with refused, without_model_hash(config), without_ignored_kwargs() if named else nullcontext():
                super().__init__(
                    model=model, ref_model=ref_model, args=config, train_dataset=train_dataset,
                    eval_dataset=eval_dataset, processing_class=processing_class, compute_metrics=compute_metrics,
                    callbacks=callbacks, optimizers=optimizers, quantization_config=quantization_config,
                    peft_config=peft_config,
                )  # fmt: skip
            self._finish(collate)

    def _configure(self, model: Any, args: DPOConfig | None, loss: Any, peft_config: Any) -> PreferenceConfig:
        """Check the arguments, choose the loss, and return the trainer's own copy of the arguments."""
        if args is None:
            args = PreferenceConfig(default_output(model, loss))
        self._given_loss, self._section = choose_loss(args, loss)
        for warning in self._given_loss.warnings:
            log.warning("%s", warning)
        bound = self._given_loss
        self.loss = trained_loss(bound, self._section.weights)
        config = own_copy(args, loss=bound.spec.name, loss_kwargs=dict(bound.parameters), beta=bound.beta)
        check_own_fields(config)
        check_given_adapter(peft_config)
        check_training(config, bound, adapter=peft_config is not None or starts_as_adapter(model))
        self.reference_cache = None if config.reference_cache is None else Path(config.reference_cache)
        self.max_tokens, self.async_checkpoints = config.max_tokens_per_device, config.async_checkpoints
        self.layout = "concatenated"
        self._layout_choice = config.layout  # type: ignore[assignment]
        self._ids: list[str] = []
        self._template_arguments: set[str] = set()
        self.latest_inputs: dict[str, Any] = {}
        """The last (micro-)batch of the training."""
        self.reads_reference = reads_reference(self.loss, self._section)
        self._pair_metrics = PairMetrics(beta=bound.beta, tau=bound.parameter("tau", MADPO_TAU))
        self._words = from_yaml if FROM_YAML.get() else python_words
        self._weights = {mode: WeightTotals() for mode in ("train", "eval")}
        self._step_values: dict[str, list[Tensor]] = defaultdict(list)
        return config

    def _finish(self, collate: dict[str, Any]) -> None:
        """Prepare what needs the model."""
        args = self.args
        if self.aux_loss_enabled:
            check_balanced(self.model.config, self.router_aux_loss_coef)
        if self.max_tokens is not None and self.is_deepspeed_enabled:
            refuse_split_batches()
        begin_adapter(self.model)
        fields = {name: getattr(args, name) for name in ("max_length", "truncation_mode", "pad_to_multiple_of")}
        self.data_collator = PairCollator(**{"pad_token_id": self.data_collator.pad_token_id} | fields | collate)
        self._prepare_layout(self.train_dataset)
        if not self.reads_reference:
            log.info("reference: the loss %s reads none, so none is run; a logged reward is beta log p(response)",
                     self.loss.spec.name)  # fmt: skip
        self._add_lengths()
        self._add_parts()

    def _add_parts(self) -> None:
        """Create what a loss may need besides its function."""
        gather, rank = self.accelerator.gather, self.accelerator.process_index
        section = self._section
        remedy, tilt = section.remedy, section.weights.tilt if section.weights else None
        self.remedy = None if remedy is None else GradientRemedy(self.model, self.loss, remedy, self.accelerator)
        if has_adapter(self.model):
            reads = section.token_mask is not None or self.loss.spec.tokens == "reference"
            live = reads or not self.args.precompute_ref_log_probs
            check_started(
                self.model,
                Use(
                    live=live and self.ref_model is None, synced=self.args.sync_ref_model,
                    checkpointing=self.args.gradient_checkpointing, measured=remedy is not None,
                ),
            )  # fmt: skip
        self.token_mask = None if section.token_mask is None else self._make_token_mask(section.token_mask)
        self.tilt = None if tilt is None else LossTilt(tilt, gather, rank)
        self._tied = None if remedy is not None else tied_embedding(self.model, self.accelerator)
        if self.loss.spec.tokens == "reference" and self.ref_model is None and not has_adapter(self.model):
            refuse_precomputed_tokens(self.loss.spec.name)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        reference = partial(self.run_reference, metrics=self.loss.spec.tokens == "reference")
        self.pair_losses = PairLosses(
            self.loss, self.token_mask, reference, self._step_values, vocabulary=vocabulary, gather=gather,
            rank=rank, seed=self.args.seed,
        )  # fmt: skip

    def make_guard(self, *, scaled: bool) -> FiniteGuard:
        """Return a guard that also checks the loss of every pair."""
        return FiniteGuard(self._ids, lambda pair: self.compute_loss(self.model, pair), scaled=scaled)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Margin, weight and trust of each pair, whose words count, its row in the table and its length."""
        return (*PAIR_COLUMNS, *MASK_COLUMNS, ROW, *super().extra_columns)

    def _make_token_mask(self, config: TokenMaskSection) -> TokenMask:
        if self.ref_model is None and not has_adapter(self.model):
            refuse_precomputed_tokens("a token_mask")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return TokenMask(vocabulary, config, self.accelerator)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of a step; a loss that compares all their pairs sees them first, without gradient."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.loss.spec.coupled and samples and (len(samples) > 1 or self.max_tokens is not None):
            self.model.train()
            parts = [self._prepare_inputs(part) for batch in samples for part in self._micro_batches(batch)]
            with as_in_step(device), self.compute_loss_context_manager():
                passes = [(self._logps(self.model_wrapped, part)[1], part) for part in parts]
            self.pair_losses.compare(passes, self.state.global_step)
        return samples, items

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Train one batch; the last of an optimizer step also steps the token mask and hands over the metrics."""
        total = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.token_mask is not None:
                self.token_mask.step()
            self._log_pairs("train")
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Sum of weight * loss over the pairs of ``inputs``, divided by the pairs of the optimizer step.

        So the loss of a step is the mean over its pairs, however they are split into micro-batches and over processes
        (whose gradients the launcher averages); duplicates that only fill the last batch (``WholeEpochs``) are left
        out. Without ``num_items_in_batch`` it is the mean over ``inputs``.
        """
        training = self.model.training
        if training:
            self.latest_inputs = inputs
        real: Tensor | None = inputs.get(REAL)
        policy, logps = self._logps(model, inputs)
        per_pair, terms = self.pair_losses(policy, logps, inputs, step=self.state.global_step, training=training)
        weight: Tensor = inputs.get("weight", torch.ones_like(logps.ref_chosen))
        if real is not None:
            weight = weight * real
        if training and self.tilt is not None:
            tilted, _ = self.tilt(per_pair, self.loss.beta * logps.log_ratio_gap, self.state.global_step, real)
            weight = weight * tilted
        margin: Tensor | None = inputs.get("margin")
        pairs: Tensor | float = len(per_pair)
        if training:
            self.guard.check_losses(inputs, weight * per_pair, logps, {"margin": margin, "weight": weight})
            if num_items_in_batch is not None:
                pairs = num_items_in_batch / self.accelerator.num_processes
        loss = (weight * per_pair).sum() / pairs
        if policy.balance is not None:
            mean = self.accelerator.gather(policy.balance.detach()).mean()
            self._metrics["train" if training else "eval"]["aux_loss"].append(float(mean))
            counted = len(per_pair) if real is None else real.sum()
            loss = loss + self.router_aux_loss_coef * policy.balance * counted / pairs
        for name, values in terms.items():
            self._step_values[f"loss/{name}"].append(only_real((weight * values).detach(), real))
        self._pair_metrics.reference = self.reads_reference
        self._pair_metrics.add(policy, logps, weight * self.pair_losses.own_weight, margin, real)
        if training and self.left_out is not None:
            out, self.left_out = self.left_out, None
            self._pair_metrics.add_left_out(out.weight, out.margin, out.real)
            for name in terms:
                self._step_values[f"loss/{name}"].append(only_real(out.weight, out.real))
        if not training:
            self._log_pairs("eval")
        return (loss, self._outputs(model, inputs)) if return_outputs else loss

    def _outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """The model's outputs with logits, for ``compute_metrics``; one more forward pass, as in trl."""
        with torch.no_grad():
            return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def _logps(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[SequenceLogps, PairLogps]:
        """Log-probs of a batch under the policy, and with the reference's and the remedy's gradient factors."""
        if not self.reads_reference:
            ref_chosen = ref_rejected = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
        elif self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self._reference, inputs)
        factors = None
        if self.remedy is not None and self.model.training:
            factors = self.remedy.factors(inputs, ref_chosen, ref_rejected)
            touched = ((factors[0] != 1) | (factors[1] != 1)).float()
            for name, values in (("chosen", factors[0]), ("rejected", factors[1]), ("touched", touched)):
                self._step_values[f"remedy/{name}"].append(only_real(values, inputs.get(REAL)))
        policy = pair_logps(model, inputs, self.layout, balance=self.aux_loss_enabled)
        return policy, PairLogps(
            chosen=policy.chosen if factors is None else scale_gradient(policy.chosen, factors[0]),
            rejected=policy.rejected if factors is None else scale_gradient(policy.rejected, factors[1]),
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=policy.chosen_length,
            rejected_length=policy.rejected_length,
            thumb=inputs.get(THUMB),
        )

    def _log_pairs(self, mode: str) -> None:
        """Hand the metrics of a step over to trl, averaged over all processes."""
        for name, value in self._pair_metrics.flush(self.accelerator.gather, self._weights[mode]).items():
            self._metrics[mode][name].append(value)
        for name, parts in self._step_values.items():
            values = torch.cat(parts)
            total, count = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]))
            self._metrics[mode][name].append(float(total / count))
        self._step_values.clear()
        for name, number in self.pair_losses.logged.items():
            self._metrics[mode][name].append(number)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as trl does: means over steps; the weights are those of all pairs since the last log."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update({name: [value] for name, value in self._weights[mode].flush().items()})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained model or adapter, whole and in a fixed order of its fields; every process calls this.

        The arguments of the chat template that it was trained with are recorded next to it.
        """
        if self.is_fsdp_enabled and not _internal_call:  # checkpoints may be sharded, the model is not
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            folder = Path(output_dir or self.args.output_dir)
            finish_adapter(folder, self.model)
            write_record(self._template_arguments, folder)

    def save_extra_state(self, folder: Path) -> None:
        """Write the state of loss, remedy, token mask and a reference that moves, and the count of tokens."""
        state = {"statistics": self.pair_losses.state_dict(), "num_tokens": self._total_train_tokens}
        remedy = None if self.remedy is None else self.remedy.state_dict()
        write_json(folder / LOSS_STATE, {**state, "remedy": remedy})
        if self.token_mask is not None:
            self.token_mask.save(folder)
        if self.args.sync_ref_model:
            save_reference(self._reference, folder, self.accelerator)

    def load_extra_state(self, folder: Path) -> None:
        """Restore what ``save_extra_state`` wrote."""
        if self.args.sync_ref_model:
            load_reference(self._reference, folder, self.accelerator)
        if not (folder / LOSS_STATE).exists():
            return
        state = read_json(folder / LOSS_STATE)
        self._total_train_tokens = int(state["num_tokens"])
        self.pair_losses.load_state_dict(state.get("statistics", {}))
        if self.remedy is not None:
            self.remedy.load_state_dict(state["remedy"])
        if self.token_mask is not None:
            self.token_mask.load(folder)
