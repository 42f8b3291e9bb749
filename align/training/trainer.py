"""PreferenceTrainer: trl's DPOTrainer with a pair's loss taken from align/losses/pairwise.py and weighted per pair."""

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from align.config import RemedySection, TiltSection, TokenMaskSection
from align.config.columns import IN_BATCH, REFERENCE_LOGPS
from align.distributed import from_main_process
from align.errors import ConfigError, DataError
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.beta_dpo import BetaDpoState, beta_dpo, beta_dpo_step
from align.losses.pair_weights import LossTilt
from align.losses.pairwise import PairLogps, scale_gradient
from align.losses.registry import BoundLoss
from align.models.adapters import copy_adapter
from align.models.batching import in_so_many, token_batches
from align.models.collator import REAL, ROW, PairCollator, only_real
from align.models.fingerprint import reference_key
from align.models.layout import LayoutChoice, choose_layout, has_adapter, trim
from align.models.logps import Layout, SequenceLogps, pair_logps
from align.models.packing import packed_tokens
from align.training.adapters import check_started, head_adapter_allowed
from align.training.base.async_checkpoints import BackgroundSaves
from align.training.base.epochs import WholeEpochs
from align.training.base.resume import ExactResume
from align.training.finite_guard import FiniteGuard, numbered
from align.training.gradient_remedy import GradientRemedy
from align.training.metrics import PairMetrics
from align.training.reference import reference_logps
from align.training.token_mask import TokenMask

REFERENCE_TOKENS = 8192
"""Tokens of a batch of reference log-probs where no budget is set."""
LAYOUT_SAMPLE = 256
BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Orders of the pairs for which the trainer reads their lengths."""
LOSS_STATE = "loss_state.json"
UNUSED_FIELDS = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl", "loss_weights": None}


class PreferenceTrainer(BackgroundSaves, ExactResume, WholeEpochs, DPOTrainer):
    """trl's DPOTrainer, its loss replaced by ``loss`` and multiplied by the pair's ``weight`` before the mean.

    The loss of an optimizer step is mean_i weight_i * loss_i over its pairs; weights are not renormalised.
    Data preparation, LoRA, checkpoints, logging and launchers are trl's.

    Args:
        loss: a loss bound to its parameters.
        tau: edge of the margin regions that are logged (in units of the margin).
        reference_cache: folder that keeps reference log-probs between runs, or None.
        layout: how log-probs are computed, see ``choose_layout``.
        max_tokens: tokens of one forward pass; a batch of more is split, with the same gradient. None: never split.
        remedy: what is done about gradient entanglement, or None.
        token_mask: a learned mask over the tokens that the loss sees, or None.
        tilt: weights from the losses of each forward pass over all processes, beside ``weight``, or None.
        kwargs: those of ``trl.DPOTrainer``.

    Raises:
        ConfigError: a field of DPOConfig is set that only trl's own losses know, or a layout that is not exact for
            the model.
    """

    data_collator: Any
    _signature_columns: Any
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
        for field, neutral in UNUSED_FIELDS.items():
            if getattr(args, field) != neutral:
                raise ConfigError(
                    f"train.trainer.{field}: {getattr(args, field)!r} has no meaning for the losses of this program",
                    code="trainer-key",
                    hint="leave it out; name the loss under train.methods",
                )
        self.loss = loss
        self.tau = tau
        self.reference_cache = reference_cache
        self.layout = "concatenated"
        self._layout_is_chosen = False
        self.max_tokens = max_tokens
        self.beta_state = BetaDpoState()
        self.latest_inputs: dict[str, Any] = {}
        """The last (micro-)batch that was trained on."""
        self._layout_choice = layout
        self._pair_metrics = PairMetrics(beta=loss.beta, tau=tau)
        self._step_values: dict[str, list[Tensor]] = defaultdict(list)
        args.beta = loss.beta
        args.loss_type = ["sigmoid"]
        kwargs["train_dataset"], ids = numbered(kwargs["train_dataset"])
        with head_adapter_allowed():
            super().__init__(**kwargs)
        self._leave_experts_unbalanced()
        scaled = self.accelerator.scaler is not None
        self.guard = FiniteGuard(ids, lambda pair: self.compute_loss(self.model, pair), scaled=scaled)
        self.add_callback(self.guard)
        self.data_collator = PairCollator(
            pad_token_id=self.data_collator.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        self._prepare_layout(self.train_dataset)
        if args.train_sampling_strategy in BY_LENGTH:
            self.train_dataset = self.train_dataset.add_column(args.length_column_name, _tokens(self.train_dataset))
        self.remedy = None if remedy is None else GradientRemedy(self.model, loss, remedy, self.accelerator)
        check_started(list(self.model.peft_config.values()) if has_adapter(self.model) else [])
        self.token_mask = None if token_mask is None else self._make_token_mask(token_mask)
        self.tilt = None
        if tilt is not None:
            self.tilt = LossTilt(tilt, self.accelerator.gather, self.accelerator.process_index)

    def _make_token_mask(self, config: TokenMaskSection) -> TokenMask:
        if self.ref_model is None and not has_adapter(self.model):
            raise ConfigError(
                "train.trainer.precompute_ref_log_probs: found true beside a token_mask, which reads the reference "
                "in every step: without an adapter no reference is left",
                code="trainer-key",
                hint="leave it out, or train an adapter",
            )
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return TokenMask(vocabulary, config, self.accelerator)

    def _leave_experts_unbalanced(self) -> None:
        """Refuse or say that the load-balancing loss of a mixture of experts, which trl adds, is not added here."""
        if not self.aux_loss_enabled:
            return
        coefficient = self.router_aux_loss_coef
        if self.args.router_aux_loss_coef is not None:
            raise ConfigError(
                f"train.trainer.router_aux_loss_coef: found {coefficient:g}, expected 0 or none: the losses of this "
                "program do not balance experts",
                code="trainer-key",
                hint="leave it out, and train an adapter that leaves the routers as they are",
            )
        log.warning("the experts' load-balancing loss of this model (%g in its config) is not added", coefficient)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """trl's, which leaves out pairs whose prompt fills ``max_length``; here it is said."""
        prepared = super()._prepare_dataset(dataset, *args, **kwargs)
        missing = len(dataset) - len(prepared)
        if missing == len(dataset):
            raise DataError(
                f"none of {missing} pairs has a token of a response within max_length",
                code="empty-completion",
                hint="raise train.trainer.max_length",
            )
        if missing:
            log.warning("%d of %d pairs are left out: their prompts fill max_length", missing, len(dataset))
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *IN_BATCH, ROW, self.args.length_column_name]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probs as columns, kept on disk under a key of (reference weights, token ids, truncation)."""
        self._prepare_layout(dataset)
        if self.is_deepspeed_enabled:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        file = None
        if self.reference_cache is not None:
            settings = [self.args.max_length, self.args.truncation_mode]
            settings += [name for name in ("bf16", "fp16") if getattr(self.args, name)]
            # The policy is its own reference before the first step, and not sharded yet, as the reference may be.
            key = from_main_process(
                lambda: reference_key(self.model, dataset, settings, with_adapter=self._continues_an_adapter)
            )
            file = self.reference_cache / f"{key}.npy"
        values = reference_logps(
            dataset,
            self._reference_of_examples,
            self.accelerator,
            batch_tokens=self.max_tokens or REFERENCE_TOKENS,
            file=file,
            in_step=self.is_fsdp_enabled,
        )
        columns = Dataset.from_dict(dict(zip(REFERENCE_LOGPS, values.T, strict=True)))
        return concatenate_datasets([dataset, columns], axis=1)

    def _reference_of_examples(self, examples: list[dict[str, Any]]) -> Tensor:
        batch = self.data_collator(examples)
        batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        return torch.stack(self.compute_ref_log_probs(self._reference, batch), dim=1)

    @property
    def _continues_an_adapter(self) -> bool:
        """The policy began as an adapter that was trained before; trl keeps a copy of it, ``ref``, as the reference."""
        return has_adapter(self.model) and "ref" in self.model.peft_config

    @property
    def _reference(self) -> torch.nn.Module:
        return self.ref_model if self.ref_model is not None else self.model

    def _prepare_layout(self, dataset: Dataset) -> None:
        """Choose the layout once, before the first forward pass."""
        if not self._layout_is_chosen:
            self._layout_is_chosen = True
            if self._continues_an_adapter:
                copy_adapter(self.model, "default", "ref")  # trl copies but a part of what some adapters hold
            sample = self.data_collator([dataset[k] for k in range(min(LAYOUT_SAMPLE, len(dataset)))])
            self.layout = choose_layout(self.model, sample, self._layout_choice)
            if self.ref_model is not None:
                choose_layout(self.ref_model, sample, self.layout)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs [B], [B] of the chosen and rejected responses under the reference, without gradient."""
        if self.is_deepspeed_enabled:
            inputs = {name: value for name, value in inputs.items() if name not in (*IN_BATCH, ROW, REAL)}
            return super().compute_ref_log_probs(model, inputs)
        found = self._under_reference(inputs)
        return found.chosen, found.rejected

    def _under_reference(self, inputs: dict[str, Any]) -> SequenceLogps:
        """Log-probs under the reference: the adapter off where it is the policy's own base."""
        off: AbstractContextManager[None] = nullcontext()
        if self.ref_model is None and has_adapter(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            off = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, off, self.accelerator.autocast():
            return pair_logps(self._reference, inputs, self.layout)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """One batch forward and backward, in micro-batches of at most ``max_tokens`` tokens."""
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

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.look_at_norm(model, norm)
        return norm

    def _micro_batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch split under the token budget, pairs of like length together.

        beta-DPO is not split: its beta comes from the whole batch. Nor is a remedy with one factor for a batch, nor
        are weights that compare the losses of a batch.
        """
        remedy_of_all = self.remedy is not None and self.remedy.of_whole_batches
        whole = self.loss.spec.function is None or remedy_of_all or self.tilt is not None
        if self.max_tokens is None or whole:
            return [inputs]
        if self.layout == "shared_prefix":
            batches = token_batches(packed_tokens(inputs).tolist(), self.max_tokens, padded=False)
        else:
            longest = inputs["attention_mask"].sum(dim=1).view(2, -1).amax(dim=0)
            batches = token_batches((2 * longest).tolist(), self.max_tokens)
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
        """Sum of weight * loss over the pairs of ``inputs``, over the pairs of the optimizer step.

        The step's loss is so the mean over its pairs whatever way they are split into micro-batches and over
        processes (whose gradients the launcher averages); pairs that only fill a last batch up (``WholeEpochs``) are
        left out. Without ``num_items_in_batch`` it is the mean of ``inputs``.
        """
        training = self.model.training
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self._reference, inputs)
        if training:
            self.latest_inputs = inputs
        real: Tensor | None = inputs.get(REAL)
        of_chosen, of_rejected = self._gradient_factors(inputs, ref_chosen, ref_rejected)
        policy = pair_logps(model, inputs, self.layout)
        logps = PairLogps(
            chosen=scale_gradient(policy.chosen, of_chosen),
            rejected=scale_gradient(policy.rejected, of_rejected),
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=policy.chosen_length,
            rejected_length=policy.rejected_length,
        )
        margin: Tensor | None = inputs.get("margin")
        weight: Tensor = inputs.get("weight", torch.ones_like(ref_chosen))
        if real is not None:
            weight = weight * real
        if self.loss.spec.function is None:
            per_pair = self._adaptive_beta(logps, real)
        elif self.token_mask is not None:
            per_pair = self._masked_loss(policy, inputs)
        else:
            per_pair = self.loss(logps, margin, inputs.get("trust"))
        if training and self.tilt is not None:
            tilted, _ = self.tilt(per_pair, self.loss.beta * logps.log_ratio_gap, self.state.global_step, real)
            weight = weight * tilted
        if training:
            shown = {
                "chosen": logps.chosen,
                "rejected": logps.rejected,
                "reference chosen": ref_chosen,
                "reference rejected": ref_rejected,
                "margin": margin,
                "weight": weight,
            }
            self.guard.look(inputs, weight * per_pair, shown)
        pairs: Tensor | float = len(per_pair)
        if training and num_items_in_batch is not None:
            pairs = num_items_in_batch / self.accelerator.num_processes
        loss = (weight * per_pair).sum() / pairs
        self._pair_metrics.add(policy, logps, weight, margin, real)
        if not training:
            self._log_pairs("eval")
        return (loss, policy.tokens) if return_outputs else loss

    def _gradient_factors(
        self, inputs: dict[str, Any], ref_chosen: Tensor, ref_rejected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Factors [B], [B] of the chosen and the rejected gradients; 1 without a remedy."""
        if self.remedy is None or not self.model.training:
            return torch.ones_like(ref_chosen), torch.ones_like(ref_rejected)
        real = inputs.get(REAL)
        if real is not None and real.any() and not real.all():
            rows = real.nonzero().flatten()
            found = self.remedy.factors(trim(inputs, rows), ref_chosen[rows], ref_rejected[rows])
            of_chosen, of_rejected = (torch.ones_like(ref_chosen).index_copy(0, rows, values) for values in found)
        else:
            of_chosen, of_rejected = self.remedy.factors(inputs, ref_chosen, ref_rejected)
        touched = (of_chosen != 1) | (of_rejected != 1)
        for name, values in (("chosen", of_chosen), ("rejected", of_rejected), ("touched", touched.float())):
            self._step_values[f"remedy/{name}"].append(only_real(values, real))
        return of_chosen, of_rejected

    def _masked_loss(self, policy: SequenceLogps, inputs: dict[str, Any]) -> Tensor:
        """Loss [B] of the tokens that the mask lets through, its price added while training."""
        assert self.token_mask is not None
        reference = self._under_reference(inputs).tokens.logps
        ids, completion = inputs["input_ids"], inputs["completion_mask"]
        masked, price, left = self.token_mask(policy.tokens.logps, reference, ids, completion)
        real = inputs.get(REAL)
        self._step_values["token_mask/left"].append(only_real(left, None if real is None else real.repeat(2)))
        per_pair = self.loss(masked, inputs.get("margin"), inputs.get("trust"))
        return per_pair + (price if self.model.training else 0.0)

    def _log_pairs(self, mode: str) -> None:
        for name, value in self._pair_metrics.flush(self.accelerator.gather).items():
            self._metrics[mode][name].append(value)
        for name, parts in self._step_values.items():
            values = torch.cat(parts)
            total, count = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]))
            self._metrics[mode][name].append(float(total / count))
        self._step_values.clear()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _adaptive_beta(self, logps: PairLogps, real: Tensor | None) -> Tensor:
        """beta-DPO's loss; its statistics run over the pairs of all processes (arXiv 2407.08639)."""
        counts = torch.ones_like(logps.chosen, dtype=torch.bool) if real is None else real
        every = self.accelerator.gather(counts)
        gaps = self.accelerator.gather(logps.log_ratio_gap.detach())[every]
        generator = torch.Generator().manual_seed(self.args.seed + 7919 * (self.state.global_step + 1))
        parameters = self.loss.parameters
        beta, keep, state = beta_dpo_step(
            gaps.cpu(),
            self.beta_state,
            beta=parameters["beta"],
            alpha=parameters["alpha"],
            rho=parameters["rho"],
            momentum=parameters["momentum"],
            generator=generator,
        )
        if self.model.training:
            self.beta_state = state
        own = logps.chosen.shape[0]
        first = own * self.accelerator.process_index
        self._metrics["train" if self.model.training else "eval"]["beta"].append(beta)
        kept = torch.zeros_like(every)
        kept[every] = keep.to(gaps.device)
        own_keep = kept[first : first + own]
        return beta_dpo(logps, beta=beta, keep=own_keep, scale=keep.numel() / int(keep.sum()))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            more = {
                "remedy": None if self.remedy is None else self.remedy.to_dict(),
                "num_tokens": self._total_train_tokens,
            }
            write_json(folder / LOSS_STATE, self.beta_state.to_dict() | more)
            if self.token_mask is not None:
                self.token_mask.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / LOSS_STATE
        if file.exists():
            state = read_json(file)
            self.beta_state = BetaDpoState.from_dict(state)
            self._total_train_tokens = int(state["num_tokens"])
            if self.remedy is not None:
                self.remedy.load(state["remedy"])
            if self.token_mask is not None:
                self.token_mask.load(file.parent)


def _tokens(dataset: Dataset) -> list[int]:
    """Tokens of the prompt with the longer response, of each pair."""
    columns = zip(dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in columns]
