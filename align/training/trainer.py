"""PreferenceTrainer: trl's DPOTrainer with the loss of a pair taken from align/losses.py and weighted per pair."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOTrainer

from align.beta_dpo import BetaDpoState, beta_dpo, beta_dpo_step
from align.console import progress
from align.errors import ConfigError
from align.loss_registry import BoundLoss
from align.losses import PairLogps
from align.margins import effective_sample_size, margin_regions
from align.stage import read_json, write_json
from align.training.collator import PAIR_COLUMNS, PairCollator
from align.training.logps import SequenceLogps, concatenated

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
LOSS_STATE = "loss_state.json"
UNUSED_FIELDS = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl", "loss_weights": None}


class PreferenceTrainer(DPOTrainer):
    """trl's DPOTrainer, its loss replaced by ``loss`` and multiplied by the pair's ``weight`` before the mean.

    The batch loss is mean_i weight_i * loss_i over the pairs of a micro-batch; weights are not renormalised.
    Everything else (data preparation, reference, LoRA, checkpoints, logging, launchers) is trl's.

    Args:
        loss: a loss bound to its parameters.
        tau: edge of the margin regions that are logged (in units of the margin).
        reference_cache: folder that keeps reference log-probs between runs, or None.
        kwargs: those of ``trl.DPOTrainer``.

    Raises:
        ConfigError: a field of DPOConfig is set that only trl's own losses know.
    """

    data_collator: Any
    _signature_columns: Any

    def __init__(self, *, loss: BoundLoss, tau: float, reference_cache: Path | None = None, **kwargs: Any) -> None:
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
        self.beta_state = BetaDpoState()
        args.beta = loss.beta
        args.loss_type = ["sigmoid"]
        super().__init__(**kwargs)
        self.data_collator = PairCollator(
            pad_token_id=self.data_collator.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *PAIR_COLUMNS]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probs as columns, kept on disk under a key of (reference weights, token ids, truncation)."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        file = None
        if self.reference_cache is not None:
            key = [self._reference_key(dataset)]
            broadcast_object_list(key, from_process=0)
            file = self.reference_cache / f"{key[0]}.parquet"
            found = [file.exists()]
            broadcast_object_list(found, from_process=0)
            if found[0]:
                return concatenate_datasets([dataset, Dataset(pq.read_table(file))], axis=1)
        columns = Dataset.from_dict(
            dict(zip(REFERENCE_COLUMNS, self._reference_logps(dataset, batch_size), strict=True))
        )
        if file is not None and self.accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            pq.write_table(columns.with_format("arrow")[:], temporary)
            temporary.replace(file)
        self.accelerator.wait_for_everyone()
        return concatenate_datasets([dataset, columns], axis=1)

    def _reference_logps(self, dataset: Dataset, batch_size: int) -> list[list[float]]:
        """[chosen, rejected], each a list of N sums of log-probs (nats), computed by all processes together."""
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        )
        parts = []
        for batch in progress(loader, what="reference log-probs", total=len(loader), unit="batches"):
            both = torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, batch), dim=1)
            parts.append(self.accelerator.gather_for_metrics(both).float().cpu())
        return torch.cat(parts).T.tolist()

    def _reference_key(self, dataset: Dataset) -> str:
        state = hashlib.sha256(f"{self.args.max_length} {self.args.truncation_mode}".encode())
        reference = self.ref_model if self.ref_model is not None else self.model
        for parameter_name, parameter in sorted(reference.named_parameters()):
            if "lora_" not in parameter_name:
                state.update(parameter_name.encode())
                state.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            for ids in dataset[column]:
                state.update(f"{column}{ids}".encode())
        return state.hexdigest()

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        policy = concatenated(model, inputs)
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_inputs = {key: value for key, value in inputs.items() if key not in PAIR_COLUMNS}
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model or self.model, ref_inputs)
        logps = PairLogps(
            chosen=policy.chosen,
            rejected=policy.rejected,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=policy.chosen_length,
            rejected_length=policy.rejected_length,
        )
        margin: Tensor | None = inputs.get("margin")
        weight: Tensor = inputs.get("weight", torch.ones_like(ref_chosen))
        per_pair = self._adaptive_beta(logps) if self.loss.spec.function is None else self.loss(logps, margin)
        loss = (weight * per_pair).mean()
        self._record(policy, logps, margin, weight, inputs)
        return (loss, policy.outputs) if return_outputs else loss

    def _adaptive_beta(self, logps: PairLogps) -> Tensor:
        """beta-DPO's loss; its statistics run over the pairs of all processes (arXiv 2407.08639)."""
        gaps = self.accelerator.gather(logps.log_ratio_gap.detach())
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
        own_keep = keep[first : first + own].to(gaps.device)
        return beta_dpo(logps, beta=beta, keep=own_keep, scale=keep.numel() / int(keep.sum()))

    def _record(
        self,
        policy: SequenceLogps,
        logps: PairLogps,
        margin: Tensor | None,
        weight: Tensor,
        inputs: dict[str, Any],
    ) -> None:
        """Append the batch's metrics: trl's names, then the weight's and the margin's."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        columns = torch.stack(
            [
                logps.chosen.detach(),
                logps.rejected.detach(),
                logps.ref_chosen,
                logps.ref_rejected,
                weight,
                margin if margin is not None else torch.zeros_like(weight),
            ]
        ).T.contiguous()
        chosen, rejected, ref_chosen, ref_rejected, weight, gathered_margin = self.accelerator.gather(columns).T
        chosen_change, rejected_change = chosen - ref_chosen, rejected - ref_rejected
        gap = chosen_change - rejected_change
        values: dict[str, Tensor | float] = {
            "rewards/chosen": self.beta * chosen_change.mean(),
            "rewards/rejected": self.beta * rejected_change.mean(),
            "rewards/accuracies": (gap > 0).float().mean(),
            "rewards/margins": self.beta * gap.mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "logps/chosen_change": chosen_change.mean(),
            "logps/rejected_change": rejected_change.mean(),
            "weight/mean": weight.mean(),
            "weight/min": weight.min(),
            "weight/max": weight.max(),
            "weight/ess_share": effective_sample_size(weight) / weight.numel(),
        }
        if margin is not None:
            values["margin/disagreement"] = (gathered_margin < 0).float().mean()
            for region, share in margin_regions(gathered_margin, self.tau).items():
                values[f"margin/share {region}"] = share
        for name, value in (values | self._token_metrics(policy, inputs)).items():
            metrics[name].append(float(value))
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        metrics["num_tokens"] = [self._total_train_tokens]

    def _token_metrics(self, policy: SequenceLogps, inputs: dict[str, Any]) -> dict[str, float]:
        """Entropy, mean logits and top-1 accuracy over completion tokens, under trl's names."""
        mask = inputs["completion_mask"][:, 1:].bool()
        chosen_mask, rejected_mask = mask.chunk(2)
        width = mask.shape[1]
        chosen_logits, rejected_logits = policy.outputs.mean_logits[:, -width:].detach().chunk(2)
        top1 = policy.outputs.is_top1[:, -width:].chunk(2)[0]
        sums = torch.stack(
            [
                policy.outputs.entropy[:, -width:].detach()[mask].sum(),
                chosen_logits[chosen_mask].sum(),
                rejected_logits[rejected_mask].sum(),
                top1[chosen_mask].sum(),
                mask.sum(),
                chosen_mask.sum(),
                rejected_mask.sum(),
            ]
        ).float()
        entropy, of_chosen, of_rejected, hits, tokens, n_chosen, n_rejected = (
            self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        )
        return {
            "entropy": entropy / max(tokens, 1),
            "logits/chosen": of_chosen / max(n_chosen, 1),
            "logits/rejected": of_rejected / max(n_rejected, 1),
            "mean_token_accuracy": hits / max(n_chosen, 1),
        }

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            write_json(folder / LOSS_STATE, self.beta_state.to_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / LOSS_STATE
        if file.exists():
            self.beta_state = BetaDpoState.from_dict(read_json(file))
