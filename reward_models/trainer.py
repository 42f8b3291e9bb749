"""Reward training under any objective: trl's RewardTrainer with the loss taken from the registry."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.config import SharpnessSection, TiltSection
from align.config.columns import NAMES
from align.io.files import read_json, write_json
from align.losses.pair_weights import LossTilt
from align.models.collator import REAL, counted, only_real
from align.training.base.async_checkpoints import BackgroundSaves
from align.training.base.epochs import WholeEpochs
from align.training.base.finite_guard import FiniteSteps
from align.training.base.resume import ExactResume
from reward_models.registry import BoundObjective
from reward_models.sharpness import SharpnessPenalty
from reward_models.tokenization import segments

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class GuardedRewardTrainer(BackgroundSaves, ExactResume, WholeEpochs, RewardTrainer):
    """trl's RewardTrainer with a look at every loss, gradient and weight; see ``FiniteSteps``.

    Args:
        ids: id of the pair in each row of ``train_dataset``.
        kwargs: those of ``trl.RewardTrainer``; ``train_dataset`` has ``chosen_ids`` and ``rejected_ids``.
    """

    _signature_columns: Any

    def __init__(self, *, ids: Sequence[str], **kwargs: Any) -> None:
        table = kwargs["train_dataset"]
        rows = zip(table["chosen_ids"], table["rejected_ids"], strict=True)
        self._names = {
            (tuple(chosen), tuple(rejected)): name for (chosen, rejected), name in zip(rows, ids, strict=True)
        }
        super().__init__(**kwargs)
        self.guard = FiniteSteps(scaled=self.accelerator.scaler is not None)
        self.add_callback(self.guard)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the lengths: the sampler groups by them."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, self.args.length_column_name]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """trl's loss, of all pairs of the batch; its metrics too count those that only fill a last batch up.

        Raises:
            NumericsError: a reward of a pair is not finite.
        """
        batch = {name: value for name, value in inputs.items() if name != REAL}
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            self._look(inputs, outputs.logits.detach())
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.look_at_norm(model, norm)
        return norm

    def _look(self, inputs: dict[str, Any], rewards: torch.Tensor) -> None:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = [tuple(row[:n]) for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        half = len(rows) // 2
        names = [self._names.get(pair, "unknown") for pair in zip(rows[:half], rows[half:], strict=True)]
        self.guard.pairs += [names[k] for k in only_real(torch.arange(half), inputs.get(REAL)).tolist()]
        pairs = rewards.squeeze(-1).view(2, half)
        bad = (~torch.isfinite(pairs).all(dim=0)).nonzero().flatten().tolist()
        if bad:
            chosen, rejected = pairs[:, bad[0]].tolist()
            said = f"is not finite (reward of chosen {chosen}, of rejected {rejected})"
            self.guard.stop("loss", [names[k] for k in bad], said)


SEGMENTS = ("chosen_second", "rejected_second")
"""Columns of sentence pairs: where the second text of each response's token ids begins."""
PENALTY_STATE = "sharpness.json"


@dataclass
class ObjectiveCollator(DataCollatorForPreference):
    """trl's collator plus one number [B] per pair from each of ``columns``: int64 for names, else float32."""

    columns: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate ``examples``; see the class."""
        batch: dict[str, Any] = super().torch_call(examples)
        if SEGMENTS[0] in examples[0]:
            starts = [example[name] for name in SEGMENTS for example in examples]
            batch["token_type_ids"] = segments(batch["attention_mask"], starts)
        for name in self.columns:
            kind = torch.int64 if name in NAMES else torch.float32
            batch[name] = torch.tensor([example[name] for example in examples], dtype=kind)
        return batch


class ObjectiveRewardTrainer(GuardedRewardTrainer):
    """The loss of a step is the mean of the objective over its pairs; with Bradley-Terry it is trl's own, to the bit.

    It is so however the pairs of a step are split into micro-batches and over processes; pairs that only fill a last
    batch up (``WholeEpochs``) are left out.
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
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        objective: BoundObjective,
        tilt: TiltSection | None = None,
        sharpness: SharpnessSection | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        super().__init__(**kwargs)
        self.tilt = None
        if tilt is not None:
            self.tilt = LossTilt(tilt, self.accelerator.gather, self.accelerator.process_index)
        self.penalty = None
        if sharpness is not None:
            reduce = partial(self.accelerator.reduce, reduction="mean")
            self.penalty = SharpnessPenalty(sharpness, self.accelerator.unwrap_model(self.model), reduce)
        self.data_collator = ObjectiveCollator(
            pad_token_id=self.data_collator.pad_token_id,
            pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
            columns=objective.columns,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *self.objective.columns, *SEGMENTS]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean of the objective over the pairs of ``inputs``, times their share of the step's pairs.

        trl's metrics are logged whatever the objective.

        Raises:
            NumericsError: a reward of a pair is not finite.
        """
        columns = {name: inputs[name] for name in self.objective.columns}
        batch = {name: value for name, value in inputs.items() if name not in columns}
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        real: Tensor | None = inputs.get(REAL)
        if self.objective.spec.name != "bradley_terry" or self.tilt is not None or real is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            loss = self._mean_loss(chosen, rejected, columns, real)
        if self.model.training and num_items_in_batch is not None:
            counts, step = self._counts(inputs), int(num_items_in_batch)
            loss = loss if counts == step else loss * counts / step
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor) -> Tensor:
        """trl's, and then the gradient of the penalty on sharpness where there is one."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.penalty is not None:
            batch = self._prepare_inputs({name: inputs[name] for name in MODEL_INPUTS if name in inputs})
            every, plain = self._together(inputs), self.penalty.model

            def mean_margin() -> Tensor:
                with self.compute_loss_context_manager():
                    chosen, rejected = plain(**batch, use_cache=False).logits.squeeze(-1).float().chunk(2)
                counting = only_real(chosen - rejected, inputs.get(REAL))
                return counting.sum() * (self.accelerator.num_processes / every)

            norm = self.penalty.add(mean_margin, every / int(num_items_in_batch))
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

    def _counts(self, inputs: dict[str, Any]) -> int:
        """Pairs that the loss of this process stands for once the launcher has averaged over the processes."""
        if not self.objective.spec.coupled:
            return counted(inputs) * self.accelerator.num_processes
        return self._together(inputs)

    def _together(self, inputs: dict[str, Any]) -> int:
        """Pairs of this batch that count, over all processes."""
        own = torch.tensor([counted(inputs)], device=self.accelerator.device)
        return int(self.accelerator.gather(own).sum())

    def _mean_loss(
        self, chosen: Tensor, rejected: Tensor, columns: dict[str, Tensor], real: Tensor | None = None
    ) -> Tensor:
        """Weighted objective and centring over the pairs that count, a scalar."""
        own, counting = slice(None), real
        if self.objective.spec.coupled:
            own = slice(
                len(chosen) * self.accelerator.process_index, len(chosen) * (self.accelerator.process_index + 1)
            )
            chosen, rejected = (self._of_all(rewards) for rewards in (chosen, rejected))
            columns = {name: self.accelerator.gather(values) for name, values in columns.items()}
            counting = None if real is None else self.accelerator.gather(real)
        losses = self._losses(chosen, rejected, columns, counting)
        if self.model.training and self.tilt is not None:
            weight, share = self.tilt(losses[own], (chosen - rejected)[own], self.state.global_step, real)
            if self.objective.spec.coupled:
                weight = self.accelerator.gather(weight)
            losses = weight * losses
            self._metrics["train"]["weight/ess_share"].append(share)
        loss = _mean(losses, counting)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * _mean((chosen + rejected) ** 2, counting)
        # Of the pairs of all processes each back-propagates its own, and the launcher averages over the processes.
        others = self.accelerator.num_processes - 1 if self.objective.spec.coupled else 0
        return loss + others * (loss - loss.detach())

    def _losses(self, chosen: Tensor, rejected: Tensor, columns: dict[str, Tensor], real: Tensor | None) -> Tensor:
        """The objective [B] of the pairs that count among themselves, 0 for the others."""
        if real is None:
            return self.objective(chosen, rejected, columns)
        found = self.objective(chosen[real], rejected[real], {name: values[real] for name, values in columns.items()})
        return found.new_zeros(len(real)).index_put((real.nonzero().flatten(),), found)

    def _of_all(self, own: Tensor) -> Tensor:
        """Values of all processes along the first dimension; this process's own keep their gradient."""
        every: Tensor = self.accelerator.gather(own.detach())
        first = own.shape[0] * self.accelerator.process_index
        return torch.cat([every[:first], own, every[first + own.shape[0] :]])


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of [B] over the pairs that count, 0 where there are none."""
    return values.mean() if real is None else (values * real).sum() / real.sum().clamp_min(1)
