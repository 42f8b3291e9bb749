"""HeldOutTrainer: a PreferenceTrainer that measures held-out pairs and samples while it trains."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from align.config import EarlyStoppingSection, KeepSection
from align.distributed import from_main_process
from align.errors import ModelError
from align.io.files import read_json, write_json
from align.io.hashing import digest
from align.models.collator import ROW
from align.models.layout import has_adapter
from align.training.held_out import HeldOut, check_values, pair_metrics
from align.training.held_out_choice import EVAL, EarlyStopping, check_limit, flat_metrics
from align.training.held_out_pass import HeldOutPass
from align.training.reference import reference_model
from align.training.trainer import PreferenceTrainer

FOLDER = "held-out"
"""Folder of a training with the records of its evaluations."""
SAMPLES = "samples"
SAME_SUMS = 1e-9
"""Relative difference of two float64 sums of the same weights, at most; a training step makes far more."""


class Sampler(Protocol):
    """Samples a policy and judges what it writes; align/evaluation/while_training.py has the one of a run."""

    every: int
    """Optimizer steps between two samplings."""

    def __call__(self, trainer: "HeldOutTrainer", step: int, state: str, folder: Path) -> dict[str, Any]:
        """The record of one step: part -> metric -> estimate, and the cost; every process calls this.

        Args:
            trainer: holds the policy as it is.
            step: finished optimizer steps.
            state: digest of the policy's weights.
            folder: for the samples, also those of a call that was stopped.
        """
        ...


@dataclass(frozen=True, slots=True)
class Watch:
    """What is measured while a policy trains, and what follows from it."""

    pairs: HeldOut | None = None
    sampler: Sampler | None = None
    keep: KeepSection | None = None
    early_stopping: EarlyStoppingSection | None = None


class HeldOutTrainer(PreferenceTrainer):
    """Evaluates at the start, every ``eval_steps`` and at the end; each evaluation is a file that outlives a kill.

    The record of a step has the digest of the weights that it was measured on. A resumed training that comes to the
    same weights again reads it, and measures any others anew.

    Args:
        model: folder or hub id.
        watch: what is measured.
        folder: for the records.
        kwargs: those of ``PreferenceTrainer``.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *,
        watch: Watch,
        folder: Path,
        **others: Any,
    ) -> None:
        self.watch = watch
        self.records_folder = folder / FOLDER
        table = None if watch.pairs is None else watch.pairs.pairs
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset=table, **others)
        self._pass: HeldOutPass | None = None
        self._start = _parameter_sums(self.model) if self._reloads_reference() else {}
        if watch.pairs is not None:
            self.add_callback(_End())
        if watch.sampler is not None:
            self.add_callback(_Samples(watch.sampler.every, self))
        if watch.early_stopping is not None:
            stopping = watch.early_stopping
            self.add_callback(EarlyStopping(stopping.patience, stopping.threshold))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """As for every trainer; but the evaluation computes those of its own table, see ``HeldOutPass``."""
        if name == "eval" and not hasattr(self, "_pass") and not self.is_deepspeed_enabled:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The record of every evaluated step, in order."""
        files = sorted(self.records_folder.glob("step-*.json"), key=lambda file: int(file.stem.rsplit("-", 1)[1]))
        found = [read_json(file) for file in files]
        return [one for one in found if one["step"] <= self.state.global_step]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the policy as it is, or read the finished record of this step; with a table, evaluate as trl does."""
        if args or kwargs.get("eval_dataset") is not None:
            return super().evaluate(*args, **kwargs)
        with self._words():
            return self._evaluate_step(self.state.global_step)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate; a resumed training has evaluated the start already."""
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _evaluate_step(self, step: int) -> dict[str, float]:
        training = self.model.training
        self.model.eval()
        weights = self.weights_digest()
        file = self.records_folder / f"step-{step}.json"
        record: dict[str, Any] = from_main_process(lambda: _finished(file, step, weights))
        if self.watch.pairs is not None and "pairs" not in record:
            record |= self._measure_pairs(self.watch.pairs)
            self._write_record(file, record)
        if self._samples_now(step):
            self._sample(record, file)
        metrics = flat_metrics(record, self.watch.keep)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.watch.sampler is not None and self.control.should_training_stop and SAMPLES not in record:
            self._sample(record, file)  # it stops early, and the end is always sampled
            metrics = flat_metrics(record, self.watch.keep)
            self.log({name: value for name, value in metrics.items() if name.startswith(f"{EVAL}{SAMPLES}")})
        self.model.train(training)
        return metrics

    def _samples_now(self, step: int) -> bool:
        sampler = self.watch.sampler
        return sampler is not None and (step % sampler.every == 0 or step >= self.state.max_steps)

    def _sample(self, record: dict[str, Any], file: Path) -> None:
        if SAMPLES in record:
            return
        assert self.watch.sampler is not None
        record[SAMPLES] = self.watch.sampler(self, record["step"], record["weights"], self.records_folder / SAMPLES)
        self._write_record(file, record)

    def _measure_pairs(self, held_out: HeldOut) -> dict[str, Any]:
        start = time.monotonic()
        if self._pass is None:
            self._pass = HeldOutPass(self, self.eval_dataset, self.records_folder)
            self._pass.prepare()
        values = self._pass()
        rows = np.asarray(self.eval_dataset[ROW])
        ids = held_out.pairs["id"] if "id" in held_out.pairs.column_names else range(len(held_out.pairs))
        check_values(values, [str(ids[row]) for row in rows.tolist()])
        found = {}
        for name, part in held_out.parts().items():
            of = part[rows]
            chosen = {key: column[of] for key, column in values.items()}
            found[name] = pair_metrics(chosen, held_out.clusters[rows][of], beta=self.loss.beta) if of.any() else {}
        if self.watch.keep is not None:
            check_limit(found, self.watch.keep)
        cost = {"seconds": time.monotonic() - start, "tokens": self._pass.tokens, "pairs": len(rows)}
        return {"pairs": found, "cost": cost}

    def _write_record(self, file: Path, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in transformers; a step that the rule of ``keep`` prefers gets a checkpoint, one it cannot judge none."""
        name = EVAL + str(self.args.metric_for_best_model).removeprefix(EVAL)
        if self.args.metric_for_best_model is not None and name not in metrics:
            return False
        better = super()._determine_best_metric(metrics, trial)
        if better and self.watch.keep is not None:
            self.control.should_save = True
        return better

    def weights_digest(self) -> str:
        """Digest of the trained weights of this process: sums that any change of a step alters."""
        local = [_local(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        sums = [part.sum(dtype=torch.float64) for whole in local for part in (whole, whole.abs())]
        return from_main_process(lambda: digest([value.hex() for value in torch.stack(sums).tolist()])[:16])

    def _reloads_reference(self) -> bool:
        """Whether the start of the training is no longer in memory once the policy has moved, and samples need it.

        Under DeepSpeed no process holds the whole model, so that its start cannot be compared.
        """
        sampled = self.watch.sampler is not None and self.ref_model is None and not has_adapter(self.model)
        return sampled and self.is_world_process_zero() and not self.is_deepspeed_enabled

    def _check_start(self, loaded: nn.Module) -> None:
        """Raise ModelError if ``loaded`` is not the model that this training started from."""
        found = _parameter_sums(loaded) if self._start else {}
        other = [name for name in {**self._start, **found} if not _close(self._start.get(name), found.get(name))]
        if other:
            raise ModelError(
                f"{self.model.config._name_or_path}: found other weights than those that the training started from "
                f"({other[0]}, {len(other)} of {len(self._start)}), expected its reference: the KL of samples would be "
                "to another model",
                code="train-reference",
                hint="leave the folder as it is while a run trains; save a model that was changed in memory into a "
                "folder, and train from that",
            )

    @contextmanager
    def sampling_reference(self) -> Iterator[nn.Module]:
        """Yield the model that the policy is trained from, for forward passes without gradient on samples.

        If a full training has its log-probs precomputed, there is none in memory: it is loaded for the block.

        Raises:
            ModelError: the weights of the loaded model are not those of the start, because the folder or the model in
                memory was changed.
        """
        if self.ref_model is None and not has_adapter(self.model) and self.state.global_step:
            from align.models.loading import load_policy, place

            kwargs: dict[str, Any] = {"dtype": "float32"} | dict(self.args.model_init_kwargs or {})
            trusted = bool(kwargs.pop("trust_remote_code", self.args.trust_remote_code))
            loaded = load_policy(self.model.config._name_or_path, trust_remote_code=trusted, **kwargs)
            from_main_process(lambda: self._check_start(loaded))
            with torch.no_grad(), self.accelerator.autocast():
                yield place(loaded, self.accelerator.device).eval()
            return
        checkpointing = self.args.gradient_checkpointing_kwargs
        with reference_model(self.model, self.ref_model, self.accelerator, checkpointing) as reference:
            yield reference


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this process holds."""
    own = parameter.detach()
    local: torch.Tensor = own.to_local() if isinstance(own, DTensor) else own
    return local


def _parameter_sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Sum of each parameter and of its absolute values, in float64."""
    return {
        name: (float(value.sum(dtype=torch.float64)), float(value.abs().sum(dtype=torch.float64)))
        for name, value in ((name, parameter.detach()) for name, parameter in model.named_parameters())
    }


def _close(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    """Whether two parameters have the same sums but for the rounding of another device."""
    if one is None or other is None:
        return False
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= SAME_SUMS * max(one[1], other[1])


def _finished(file: Path, step: int, weights: str) -> dict[str, Any]:
    """What a stopped training measured in this step on these weights; else an empty record of the step."""
    record = read_json(file) if file.exists() else {}
    return record if record.get("weights") == weights else {"step": step, "weights": weights}


class _End(TrainerCallback):
    """Requests the evaluation of the end where ``eval_delay`` leaves it out."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request it after the last step."""
        passed = (state.epoch or 0) if args.eval_strategy == IntervalStrategy.EPOCH else state.global_step
        if state.global_step >= state.max_steps and args.eval_delay > passed:
            control.should_evaluate = True


class _Samples(TrainerCallback):
    """Requests an evaluation where samples are due."""

    def __init__(self, every: int, trainer: HeldOutTrainer) -> None:
        self.every = every
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample the start, unless the trainer evaluates it anyway."""
        if not args.eval_on_start and not state.global_step:
            self.trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request it every so many steps, and at the end."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True
