"""PreferenceTrainer: trl's DPOTrainer with the loss of a pair taken from align/losses and weighted per pair."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer
from trl.data_utils import extract_prompt

from align.config import RemedySection, TiltSection, TokenMaskSection
from align.config.columns import PAIR_COLUMNS
from align.errors import DataError
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.pair_weights import LossTilt
from align.losses.pairwise import PairLogps, scale_gradient
from align.losses.registry import BoundLoss
from align.models.adapters import copy_adapter
from align.models.batching import in_so_many, pair_batches
from align.models.collator import REAL, ROW, PairCollator, only_real
from align.models.layout import LayoutChoice, base_model, choose_layout, has_adapter, longest_sequence, trim
from align.models.logps import Layout, SequenceLogps, pair_logps
from align.models.positions import check_positions
from align.models.tokenization import encode_table
from align.training.adapters import check_started, head_adapter_allowed
from align.training.base.trainer import ReliableTrainer
from align.training.columns import told_apart
from align.training.finite_guard import FiniteGuard, number_rows
from align.training.gradient_remedy import GradientRemedy
from align.training.metrics import PairMetrics
from align.training.pair_losses import PairLosses, as_in_step
from align.training.reference import (
    TRL_REFERENCE,
    add_reference_logps,
    cache_file,
    load_reference,
    reference_model,
    save_reference,
    starts_from_adapter,
)
from align.training.settings import (
    refuse_expert_balancing,
    refuse_precomputed_tokens,
    refuse_split_batches,
    refuse_unused_fields,
)
from align.training.token_mask import TokenMask

LAYOUT_SAMPLE = 256
"""Pairs of the sample on which the layout is chosen."""
BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Sampling strategies that read the length of each pair."""
LOSS_STATE = "loss_state.json"


class PreferenceTrainer(ReliableTrainer, DPOTrainer):
    """trl's DPOTrainer with the loss of each pair replaced by ``loss`` and multiplied by the pair's ``weight``.

    The loss of an optimizer step is mean_i weight_i * loss_i over its pairs; weights are not normalized.
    Data preparation, LoRA, checkpoints, logging and launchers are trl's; ``ReliableTrainer`` lists what is added.

    Args:
        loss: a loss bound to its parameters.
        tau: edge of the margin regions that are logged, in units of the margin.
        reference_cache: folder that keeps reference log-probs between runs, or None.
        layout: how log-probs are computed, see ``choose_layout``.
        max_tokens: tokens per forward pass; a larger batch is split, with the same gradient. None: never split.
        remedy: remedy against gradient entanglement, or None.
        token_mask: a learned mask over the tokens that the loss sees, or None.
        tilt: weights from the losses of each forward pass over all processes, in addition to ``weight``, or None.
        kwargs: those of ``trl.DPOTrainer``.

    Raises:
        ConfigError: a field of DPOConfig is set that only trl's own losses know, or the layout is not exact for the
            model.
    """

    data_collator: Any
    guard: FiniteGuard
    loss_is_scaled_for_ga = True
    layout: Layout

    def __init__(
        self,
        *,
        loss: BoundLoss,
        tau: float,
        reference_cache: Path | None = None,
        layout: LayoutChoice = "auto",
        max_tokens: int | None = None,
        remedy: RemedySection | None = None,
        token_mask: TokenMaskSection | None = None,
        tilt: TiltSection | None = None,
        **kwargs: Any,
    ) -> None:
        args = kwargs["args"]
        refuse_unused_fields(args)
        self.loss = loss
        self.reference_cache = reference_cache
        self.layout = "concatenated"
        self.max_tokens = max_tokens
        self.latest_inputs: dict[str, Any] = {}
        """The last (micro-)batch of the training."""
        self._layout_choice: LayoutChoice | None = layout
        self._given_reference = kwargs.get("ref_model") is not None
        self._pair_metrics = PairMetrics(beta=loss.beta, tau=tau)
        self._step_values: dict[str, list[Tensor]] = defaultdict(list)
        args.beta = loss.beta
        args.loss_type = ["sigmoid"]
        kwargs["train_dataset"], self._ids = number_rows(kwargs["train_dataset"])
        with head_adapter_allowed():
            super().__init__(**kwargs)
        if self.aux_loss_enabled:
            refuse_expert_balancing(args, self.router_aux_loss_coef)
        if max_tokens is not None and self.is_deepspeed_enabled:
            refuse_split_batches()
        if starts_from_adapter(self.model):
            self.model.set_adapter("default")  # train this one; trl's frozen copy of it is the reference
        self.data_collator = PairCollator(
            pad_token_id=self.data_collator.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        self._prepare_layout(self.train_dataset)
        if args.train_sampling_strategy in BY_LENGTH:
            self.train_dataset = self.train_dataset.add_column(args.length_column_name, _lengths(self.train_dataset))
        self._add_parts(remedy, token_mask, tilt)

    def _add_parts(
        self, remedy: RemedySection | None, token_mask: TokenMaskSection | None, tilt: TiltSection | None
    ) -> None:
        """Create what a loss may need besides its function."""
        gather, rank = self.accelerator.gather, self.accelerator.process_index
        self.remedy = None if remedy is None else GradientRemedy(self.model, self.loss, remedy, self.accelerator)
        check_started(list(self.model.peft_config.values()) if has_adapter(self.model) else [])
        self.token_mask = None if token_mask is None else self._make_token_mask(token_mask)
        self.tilt = None if tilt is None else LossTilt(tilt, gather, rank)
        if self.loss.spec.tokens == "reference" and self.ref_model is None and not has_adapter(self.model):
            refuse_precomputed_tokens(self.loss.spec.name)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.pair_losses = PairLosses(
            self.loss, self.token_mask, self.run_reference, self._step_values, vocabulary=vocabulary, gather=gather,
            rank=rank, seed=self.args.seed,
        )  # fmt: skip

    def make_guard(self, *, scaled: bool) -> FiniteGuard:
        """Return a guard that also checks the loss of every pair."""
        return FiniteGuard(self._ids, lambda pair: self.compute_loss(self.model, pair), scaled=scaled)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Margin, weight and trust of each pair, its row in the table and its length."""
        return (*PAIR_COLUMNS, ROW, *super().extra_columns)

    def _make_token_mask(self, config: TokenMaskSection) -> TokenMask:
        if self.ref_model is None and not has_adapter(self.model):
            refuse_precomputed_tokens("a token_mask")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return TokenMask(vocabulary, config, self.accelerator)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """Tokenize the table, and drop pairs whose prompt fills ``max_length`` as trl does; log how many.

        Pairs whose responses became the same tokens are left out as well, see ``told_apart``.
        """
        if "prompt" not in dataset.column_names:
            dataset = dataset.map(extract_prompt)
        prepared = encode_table(dataset, processing_class, processes=args.dataset_num_proc)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            prepared = prepared.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
        missing = len(dataset) - len(prepared)
        if missing == len(dataset):
            raise DataError(
                f"none of {missing} pairs has a token of a response within max_length",
                code="empty-completion",
                hint="raise train.trainer.max_length",
            )
        if missing:
            log.warning("%d of %d pairs are left out: their prompts fill max_length", missing, len(dataset))
        kept = told_apart(prepared, self._ids, args.max_length, args.truncation_mode)
        return prepared if len(kept) == len(prepared) else prepared.select(kept)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add reference log-probs as columns, cached on disk; under DeepSpeed trl computes them."""
        self._prepare_layout(dataset)
        if self.is_deepspeed_enabled:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        return add_reference_logps(
            dataset,
            self._reference_of_examples,
            self.accelerator,
            batch_tokens=self.max_tokens,
            batch_pairs=self.args.precompute_ref_batch_size,
            file=None if self._given_reference and self.is_fsdp_enabled else self._cache_file(dataset),
            in_step=self.is_fsdp_enabled,
        )

    def _cache_file(self, dataset: Dataset) -> Path | None:
        given = self.ref_model if self._given_reference else None
        reference = None if given is None else self.accelerator.unwrap_model(given)
        return cache_file(self.reference_cache, self.model, dataset, self.args, reference)

    def _reference_of_examples(self, examples: list[dict[str, Any]]) -> Tensor:
        """Reference log-probs [B, 2] of collated examples."""
        batch = self.data_collator(examples)
        batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        return torch.stack(self.compute_ref_log_probs(self._reference, batch), dim=1)

    @property
    def _reference(self) -> torch.nn.Module:
        return self.ref_model if self.ref_model is not None else self.model

    def _prepare_layout(self, dataset: Dataset) -> None:
        """Choose the layout once, before the first forward pass."""
        choice, self._layout_choice = self._layout_choice, None
        if choice is None:
            return
        if starts_from_adapter(self.model):
            copy_adapter(self.model, "default", TRL_REFERENCE)  # trl copies only a part of some adapters
        sample = self.data_collator([dataset[k] for k in range(min(LAYOUT_SAMPLE, len(dataset)))])
        longest = longest_sequence(dataset, self.args.max_length)
        check_positions(base_model(self.model), longest, "the longest pair", "lower train.trainer.max_length")
        if self.args.neftune_noise_alpha and choice == "auto":
            log.info("layout: concatenated (neftune_noise_alpha scales its noise by the length of a row)")
            choice = "concatenated"
        self.layout = choose_layout(self.model, sample, choice, longest=longest, training=True)
        if self.ref_model is not None:
            choice = choice if self.layout == "shared_prefix" else "concatenated"
            self.layout = choose_layout(self.ref_model, sample, choice, longest=longest)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs [B], [B] of the chosen and rejected responses under the reference, without gradient."""
        if self.is_deepspeed_enabled:
            inputs = {name: value for name, value in inputs.items() if name not in (*PAIR_COLUMNS, ROW, REAL)}
            return super().compute_ref_log_probs(model, inputs)
        logps = self.run_reference(inputs)
        return logps.chosen, logps.rejected

    def run_reference(self, inputs: dict[str, Any]) -> SequenceLogps:
        """Log-probs of a batch under the reference, token by token, without gradient."""
        checkpointing = self.args.gradient_checkpointing_kwargs
        with reference_model(self.model, self.ref_model, self.accelerator, checkpointing) as reference:
            return pair_logps(reference, inputs, self.layout)

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
        """Run one batch forward and backward, in micro-batches of at most ``max_tokens`` tokens."""
        *first, last = self._micro_batches(inputs)
        total = torch.zeros((), device=self.accelerator.device)
        for batch in first:
            with self.accelerator.no_sync(model):
                total += super().training_step(model, batch, num_items_in_batch)
        total += super().training_step(model, last, num_items_in_batch)
        lengths = inputs["attention_mask"].sum(dim=1).view(2, -1).sum(dim=0)
        self._total_train_tokens += int(self.accelerator.gather(only_real(lengths, inputs.get(REAL)).sum()).sum())
        if self.accelerator.sync_gradients:
            if self.token_mask is not None:
                self.token_mask.step()
            self._log_pairs("train")
        return total

    def _micro_batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Split the batch under the token budget, pairs of similar length together.

        A batch stays in one piece if the tilt or the remedy compares its pairs with each other.
        """
        coupled = self.tilt is not None or (self.remedy is not None and self.remedy.coupled)
        if self.max_tokens is None or coupled:
            return [inputs]
        batches = pair_batches(inputs, self.layout, self.max_tokens)
        if self.is_fsdp_enabled:  # each forward pass gathers parameters from all processes
            count = torch.tensor([len(batches)], device=self.accelerator.device)
            batches = in_so_many(batches, int(self.accelerator.gather(count).max()))
        return [trim(inputs, torch.tensor(sorted(batch))) for batch in batches]

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
        for name, values in terms.items():
            self._step_values[f"loss/{name}"].append(only_real((weight * values).detach(), real))
        self._pair_metrics.add(policy, logps, weight, margin, real)
        if not training:
            self._log_pairs("eval")
        return (loss, policy.tokens) if return_outputs else loss

    def _logps(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[SequenceLogps, PairLogps]:
        """Log-probs of a batch under the policy, and with the reference's and the remedy's gradient factors."""
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self._reference, inputs)
        factors = None
        if self.remedy is not None and self.model.training:
            factors = self.remedy.factors(inputs, ref_chosen, ref_rejected)
            touched = ((factors[0] != 1) | (factors[1] != 1)).float()
            for name, values in (("chosen", factors[0]), ("rejected", factors[1]), ("touched", touched)):
                self._step_values[f"remedy/{name}"].append(only_real(values, inputs.get(REAL)))
        policy = pair_logps(model, inputs, self.layout)
        return policy, PairLogps(
            chosen=policy.chosen if factors is None else scale_gradient(policy.chosen, factors[0]),
            rejected=policy.rejected if factors is None else scale_gradient(policy.rejected, factors[1]),
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=policy.chosen_length,
            rejected_length=policy.rejected_length,
        )

    def _log_pairs(self, mode: str) -> None:
        """Hand the metrics of a step over to trl, averaged over all processes."""
        for name, value in self._pair_metrics.flush(self.accelerator.gather).items():
            self._metrics[mode][name].append(value)
        for name, parts in self._step_values.items():
            values = torch.cat(parts)
            total, count = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]))
            self._metrics[mode][name].append(float(total / count))
        self._step_values.clear()
        for name, number in self.pair_losses.logged.items():
            self._metrics[mode][name].append(number)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

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


def _lengths(dataset: Dataset) -> list[int]:
    """Tokens of the prompt with the longer response, for each pair."""
    columns = zip(dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in columns]
