"""Reward training under any objective: trl's RewardTrainer with the loss taken from the registry."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.config import SharpnessConfig, TiltConfig
from align.pair_weights import LossTilt
from align.stage import read_json, write_json
from reward_models.guard import GuardedRewardTrainer
from reward_models.objective_registry import NAMED, BoundObjective
from reward_models.sharpness import SharpnessPenalty

PENALTY_STATE = "sharpness.json"


@dataclass
class ObjectiveCollator(DataCollatorForPreference):
    """trl's collator plus one number [B] per pair from each of ``columns``: int64 for names, else float32."""

    columns: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``; see the class."""
        batch: dict[str, Any] = super().torch_call(examples)
        for name in self.columns:
            kind = torch.int64 if name in NAMED else torch.float32
            batch[name] = torch.tensor([example[name] for example in examples], dtype=kind)
        return batch


class ObjectiveRewardTrainer(GuardedRewardTrainer):
    """The loss of a step is the mean of the objective over its pairs; with Bradley-Terry it is trl's own, to the bit.

    trl's ``center_rewards_coefficient`` is added to any objective. An objective whose pairs depend on each other sees
    the pairs of all processes of one forward pass.

    Args:
        objective: bound to its parameters.
        tilt: weights of the pairs from their losses, or None.
        sharpness: a penalty whose gradient is added after each backward pass, or None.
        kwargs: those of ``GuardedRewardTrainer``; ``train_dataset`` has the objective's columns.
    """

    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *,
        objective: BoundObjective,
        tilt: TiltConfig | None = None,
        sharpness: SharpnessConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        super().__init__(**kwargs)
        self.tilt = None
        if tilt is not None:
            self.tilt = LossTilt(tilt, self.accelerator.gather, self.accelerator.process_index)
        self.penalty = None
        if sharpness is not None:
            reduce = lambda tensor: self.accelerator.reduce(tensor, "mean")  # noqa: E731
            self.penalty = SharpnessPenalty(sharpness, self.accelerator.unwrap_model(self.model), reduce)
        self.data_collator = ObjectiveCollator(
            pad_token_id=self.data_collator.pad_token_id,
            pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
            columns=objective.columns,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *self.objective.columns]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean of the objective over the pairs of ``inputs``; trl's metrics are logged whatever the objective.

        Raises:
            NumericsError: a reward of a pair is not finite.
        """
        columns = {name: inputs[name] for name in self.objective.columns}
        batch = {name: value for name, value in inputs.items() if name not in columns}
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.objective.spec.name != "bradley_terry" or self.tilt is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            loss = self._mean_loss(chosen, rejected, columns)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """trl's, and then the gradient of the penalty on sharpness where there is one."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.penalty is not None:
            batch = self._prepare_inputs({name: inputs[name] for name in ("input_ids", "attention_mask")})
            plain = self.penalty.model

            def margins() -> Tensor:
                with self.compute_loss_context_manager():
                    chosen, rejected = plain(**batch, use_cache=False).logits.squeeze(-1).float().chunk(2)
                return chosen - rejected

            norm = self.penalty.add(margins, 1 / self.current_gradient_accumulation_steps)
            self._metrics["train"]["sharpness/norm"].append(norm)
            self._metrics["train"]["sharpness/multiplier"].append(self.penalty.multiplier)
        return loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.penalty is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PENALTY_STATE, self.penalty.to_dict())
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / PENALTY_STATE
        if self.penalty is not None and file.exists():
            self.penalty.load(read_json(file))

    def _mean_loss(self, chosen: Tensor, rejected: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Weighted objective and centring, a scalar."""
        own = slice(None)
        if self.objective.spec.coupled:
            own = slice(
                len(chosen) * self.accelerator.process_index, len(chosen) * (self.accelerator.process_index + 1)
            )
            chosen, rejected = (self._of_all(rewards) for rewards in (chosen, rejected))
            columns = {name: self.accelerator.gather(values) for name, values in columns.items()}
        losses = self.objective(chosen, rejected, columns)
        if self.model.training and self.tilt is not None:
            weight, share = self.tilt(losses[own], (chosen - rejected)[own], self.state.global_step)
            if self.objective.spec.coupled:
                weight = self.accelerator.gather(weight)
            losses = weight * losses
            self._metrics["train"]["weight/ess_share"].append(share)
        loss = losses.mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        # Of the pairs of all processes each back-propagates its own, and the launcher averages over the processes.
        others = self.accelerator.num_processes - 1 if self.objective.spec.coupled else 0
        return loss + others * (loss - loss.detach())

    def _of_all(self, own: Tensor) -> Tensor:
        """Values of all processes along the first dimension; this process's own keep their gradient."""
        every: Tensor = self.accelerator.gather(own.detach())
        first = own.shape[0] * self.accelerator.process_index
        return torch.cat([every[:first], own, every[first + own.shape[0] :]])
