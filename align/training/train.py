"""Train one policy under one loss and save it."""

import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers.trainer import TRAINING_ARGS_NAME

from align.config import LossSection, TrainSection
from align.data.sampling import fair_sample, report_sample
from align.data.user_columns import KNOWN
from align.distributed import process_rank
from align.entanglement.callback import EntanglementCallback
from align.entanglement.trace import START
from align.errors import from_yaml
from align.io.console import log
from align.io.files import atomic_folder, write_json
from align.models.adapters import starts_from_adapter
from align.models.collator import ROW
from align.models.layout import has_adapter
from align.models.model_card import FILE as CARD
from align.training.adapters import check_adapter
from align.training.base.arguments import build_lora, refusals
from align.training.base.checkpoints import OPTIMIZER_SHARDS
from align.training.base.resume import STEP
from align.training.base.tracked_runs import tracked
from align.training.base.trackers import TrackedRun
from align.training.given_reference import load_given_reference
from align.training.held_out_choice import best_step, kept_step
from align.training.held_out_pass import FOLDER as STATES
from align.training.held_out_trainer import FOLDER as HELD_OUT
from align.training.held_out_trainer import HeldOutTrainer, Watch
from align.training.loss_choice import bind
from align.training.preview import show_pair
from align.training.reference import REFERENCE_FILE
from align.training.settings import check_probe, check_settings, policy_args
from align.training.trainer import PreferenceTrainer
from align.training.trainer_inputs import finish_adapter

CHECKPOINTS = "checkpoints"
MODEL = "model"
HISTORY = "history.json"
ENTANGLEMENT = "entanglement.json"
RESUME_FILES = (
    "*.pt", "*.pth", "*.bin", "trainer_state.json", STEP, "loss_state.json", "token_mask.safetensors",
    REFERENCE_FILE,
)  # fmt: skip
"""Files of a checkpoint that only a resumed training reads."""
MASK_SHOWN = 40
"""Tokens with the largest and with the smallest weights of a learned mask that go into the history."""


def train_policy(
    pairs: Dataset,
    config: TrainSection,
    method: str,
    output: Path,
    *,
    seed: int,
    reference_cache: Path | None = None,
    run: TrackedRun | None = None,
    watch: Watch | None = None,
) -> None:
    """Train ``config.model`` on ``pairs`` under one method; write ``model/`` and ``history.json`` into ``output``.

    Resumes from the last complete checkpoint under ``output/checkpoints``. At the end the checkpoints are removed, or
    reduced to their models if ``save_strategy`` asks for them. The history is written last: once it exists, the
    training is finished and calling this again does nothing.

    Args:
        pairs: pair table; with ``margin`` if the loss needs one, with ``weight`` if pairs are weighted.
        config: model, adapter and trainer fields shared by all methods.
        method: key of ``config.methods``.
        output: folder to write into.
        seed: seed of the adapter, the order of the pairs and beta-DPO's draws.
        reference_cache: folder that caches reference log-probs for the next method or run.
        run: names under which the trackers of ``report_to`` show the training.
        watch: what is measured while it trains; the records of the evaluations go into ``output/held-out``.

    Raises:
        AlignError: the configuration, the model or the pairs have a problem that the user can fix.
    """
    if (output / HISTORY).exists():
        log.info("train %s: already trained (%s)", method, output / MODEL)
        if process_rank() == 0:
            _finish_checkpoints(output / CHECKPOINTS, config)
        return
    with from_yaml():
        trainer = make_trainer(pairs, config, method, output, seed=seed, reference_cache=reference_cache, watch=watch)
        show_pair(trainer.train_dataset[0], trainer.processing_class)
        if config.trainer.get("save_strategy", "no") != "no":
            _keep_start(trainer, output / START)
        probe = attach_probe(trainer, config, output / ENTANGLEMENT)
        with tracked(trainer, run), trainer.trained(f"train {method}"):
            trainer.save_model(str(output / MODEL))
            if trainer.is_world_process_zero():
                (output / MODEL / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                write_json(output / HISTORY, _history(trainer, method, config.methods[method], probe))
                _finish_checkpoints(output / CHECKPOINTS, config)
                shutil.rmtree(output / HELD_OUT / STATES, ignore_errors=True)


def _keep_start(trainer: PreferenceTrainer, folder: Path) -> None:
    """Write a new adapter as it is before the first step, for `align entangle trace`; other models have their folder.

    A resumed training has it already.
    """
    model = trainer.model
    if not has_adapter(model) or starts_from_adapter(model) or folder.exists() or not trainer.is_world_process_zero():
        return
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        trainer.processing_class.save_pretrained(str(temporary))
        finish_adapter(temporary, model)


def make_trainer(
    pairs: Dataset,
    config: TrainSection,
    method: str,
    output: Path,
    *,
    seed: int,
    reference_cache: Path | None = None,
    watch: Watch | None = None,
) -> PreferenceTrainer:
    """Return the trainer of ``config.methods[method]``; see ``train_policy``. It reads no column of the user's own.

    Raises:
        AlignError: the configuration, the model or the pairs have a problem that the user can fix.
    """
    with from_yaml():
        check_adapter(config)
        loss = bind(method, config.methods[method])
        forced = {"output_dir": str(output / CHECKPOINTS), "seed": seed}
        args = policy_args(config, method, loss, forced, reference_cache=reference_cache)
        check_settings(config, loss, args)
        pairs = pairs.select_columns([name for name in pairs.column_names if name in KNOWN])
        reference = load_given_reference(config, loss)
        with refusals("train"):
            adapter = build_lora(config.peft, path="train.peft", task_type="CAUSAL_LM")
            if watch is None:
                return PreferenceTrainer(
                    config.model, ref_model=reference, args=args, data_collator=None, train_dataset=pairs,
                    peft_config=adapter, loss=loss,
                )  # fmt: skip
            return HeldOutTrainer(
                config.model, ref_model=reference, args=args, data_collator=None, train_dataset=pairs,
                peft_config=adapter, loss=loss, watch=watch, folder=output,
            )  # fmt: skip


def _history(
    trainer: PreferenceTrainer, method: str, options: LossSection, probe: EntanglementCallback | None
) -> dict[str, Any]:
    """Return the record of a finished training: its loss, every logged step, probe measurements, the learned mask.

    Metrics are sorted by name, as in the steps that a resumed training reads from its checkpoint.
    """
    history = [dict(sorted(entry.items())) for entry in trainer.state.log_history if "loss" in entry]
    record: dict[str, Any] = {"method": method, "loss": options.model_dump(), "history": history}
    if isinstance(trainer, HeldOutTrainer):
        record["held_out"] = _held_out(trainer)
    if probe is not None:
        record["entanglement"] = probe.records
    if trainer.token_mask is not None:
        record["token_mask"] = {
            side: [(trainer.processing_class.decode([token]), weight) for token, weight in tokens]
            for side, tokens in trainer.token_mask.extremes(MASK_SHOWN).items()
        }
    return record


def _held_out(trainer: HeldOutTrainer) -> dict[str, Any]:
    """Return every evaluation of a training, what it cost, which step was kept, and whether it stopped early."""
    records, state, args, watch = trainer.records, trainer.state, trainer.args, trainer.watch
    found: dict[str, Any] = {"steps": [{key: one[key] for key in one if key != "weights"} for one in records]}
    last, best = state.global_step, state.best_global_step if state.best_model_checkpoint else None
    if watch.keep is not None:
        found["kept"] = kept_step(records, watch.keep, best, last)
    elif args.load_best_model_at_end:
        greater = bool(args.greater_is_better)
        found["kept"] = best_step(records, str(args.metric_for_best_model), greater=greater, step=best, last=last)
    if watch.early_stopping is not None:
        found["early_stopping"] = {"step": last, "of": state.max_steps, "stopped": last < state.max_steps}
    return found


def _finish_checkpoints(checkpoints: Path, config: TrainSection) -> None:
    """Remove the checkpoints; if ``save_strategy`` asks for them, keep their models.

    Files that only a resumed training reads (optimizer, schedule, random state: pickles and logs) are removed.
    """
    if config.trainer.get("save_strategy", "no") == "no":
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    (checkpoints / CARD).unlink(missing_ok=True)  # there is no model next to the checkpoints
    for pattern in RESUME_FILES:
        for file in checkpoints.rglob(pattern):
            file.unlink()
    for shards in checkpoints.glob(f"*/{OPTIMIZER_SHARDS}"):
        shutil.rmtree(shards)


def attach_probe(trainer: PreferenceTrainer, config: TrainSection, file: Path) -> EntanglementCallback | None:
    """Add a callback that measures gradient entanglement to ``trainer`` if the configuration asks for it.

    Its probes are a fair sample of the pairs by their ids, whatever the order of the table.

    Raises:
        ConfigError: several processes, reference log-probs that are not precomputed, or a loss that compares pairs or
            reads tokens.
    """
    if config.entanglement is None:
        return None
    check_probe(
        trainer.loss, processes=trainer.accelerator.num_processes, precomputed=trainer.precompute_ref_logps
    )  # fmt: skip
    trainer.add_reference()
    callback = EntanglementCallback(
        trainer.model, _probes(trainer, config.entanglement.probes), trainer.loss, config.entanglement.every, file,
        lambda: trainer.latest_inputs, layout=trainer.layout, apart=_measured_apart(trainer),
    )  # fmt: skip
    trainer.add_callback(callback)
    return callback


def _probes(trainer: PreferenceTrainer, count: int) -> dict[str, Tensor] | None:
    """A fair sample of the pairs as a batch on the trainer's device; None: none are wanted."""
    if count == 0:
        return None
    table, ids = trainer.train_dataset, trainer.guard.ids
    drawn, total = fair_sample((ids[row] for row in table[ROW]), count)
    report_sample("entanglement probes", len(drawn), total, "pairs")
    batch = trainer.data_collator([table[k] for k in drawn])
    return {name: value.to(trainer.accelerator.device) for name, value in batch.items()}


def _measured_apart(trainer: PreferenceTrainer) -> str | None:
    """Why the passes of a step do not tell the gradients of its rows' log-probs; None if they do."""
    if trainer.layout != "concatenated":
        return "rows share their prefixes (`train.layout: concatenated` keeps them apart)"
    if trainer.accelerator.mixed_precision != "no":
        return f"it computes in {trainer.accelerator.mixed_precision}"
    if trainer.args.gradient_checkpointing:
        return "gradient checkpointing is on"
    if trainer.args.torch_compile:
        return "the model is compiled"
    if trainer.aux_loss_enabled:
        return "the load-balancing loss has a gradient of its own"
    return None
