"""Train one policy under one loss and save it."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from transformers.trainer import TRAINING_ARGS_NAME
from trl import DPOConfig

from align.config import LossSection, RemedySection, TiltSection, TokenMaskSection, TrainSection
from align.distributed import from_main_process, process_rank
from align.entanglement.callback import EntanglementCallback
from align.errors import ConfigError
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.margin_weights import MADPO_TAU
from align.losses.registry import BoundLoss, resolve
from align.models.folders import ADAPTER
from align.models.loading import load_policy, load_tokenizer
from align.training.adapters import check_adapter
from align.training.base.arguments import build_lora, build_trainer_args, refusals
from align.training.base.checkpoints import OPTIMIZER_PARTS, last_whole_checkpoint
from align.training.base.progress import show_progress
from align.training.base.resume import STEP
from align.training.base.stopping import stoppable
from align.training.columns import (
    add_trust,
    add_weight,
    adjust_margins,
    check_weights,
    normalise_weights,
    require_margin,
    without_missing_margins,
)
from align.training.preview import show_pair
from align.training.trainer import PreferenceTrainer

CHECKPOINTS = "checkpoints"
MODEL = "model"
HISTORY = "history.json"
ENTANGLEMENT = "entanglement.json"
OF_RESUMING = (
    "*.pt", "*.pth", "*.bin", "trainer_state.json", STEP, "loss_state.json", "token_mask.safetensors", "README.md",
)  # fmt: skip
"""Files of a checkpoint beside the model."""
SETS = ("target_modules", "exclude_modules", "modules_to_save")
MASK_SHOWN = 40
"""Tokens with the largest and with the smallest weights of a learned mask that are written down."""


def bind(method: str, config: LossSection) -> BoundLoss:
    """The loss of ``train.methods.<method>`` with its parameters checked.

    Raises:
        ConfigError: unknown loss or parameter, value out of range, a remedy that the loss cannot have.
    """
    try:
        loss = resolve(config.loss, config.parameters)
    except ConfigError as error:
        raise ConfigError(f"train.methods.{method}: {error.message}", code=error.code, hint=error.hint) from None
    if (config.remedy or config.token_mask) and loss.spec.function is None:
        raise ConfigError(
            f"train.methods.{method}: {loss.spec.name} has no loss of a pair alone for a remedy or a mask to work on",
            code="remedy-loss",
            hint="use them with another loss",
        )
    if config.remedy and config.token_mask:
        raise ConfigError(
            f"train.methods.{method}: found `remedy` and `token_mask`, expected at most one of them",
            code="remedy-loss",
            hint="train them as two methods",
        )
    check_weights(method, config, loss)
    return loss


def train_policy(
    pairs: Dataset,
    config: TrainSection,
    method: str,
    output: Path,
    *,
    seed: int,
    reference_cache: Path | None = None,
) -> None:
    """Train ``config.model`` on ``pairs`` under one method; write ``model/`` and ``history.json`` into ``output``.

    Resumes from the last whole checkpoint under ``output/checkpoints``; when done the checkpoints are removed, or where
    ``save_strategy`` asks for them stripped to their models. The history is written last: where it is, nothing is
    trained again.

    Args:
        pairs: pair table; ``margin`` where the loss needs one, ``weight`` where pairs are weighted.
        config: model, adapter and trainer fields shared by all methods.
        method: key of ``config.methods``.
        output: folder to write into.
        seed: seed of the adapter, the order of the pairs and beta-DPO's draws.
        reference_cache: folder that keeps reference log-probs for the next method or run.

    Raises:
        AlignError: anything in the configuration, the model or the pairs that the user can mend.
    """
    checkpoints = output / CHECKPOINTS
    if (output / HISTORY).exists():
        log.info("train %s: there already (%s)", method, output / MODEL)
        if process_rank() == 0:
            _finish_checkpoints(checkpoints, config)
        return
    loss = bind(method, config.methods[method])
    tau = float(loss.parameters.get("tau", MADPO_TAU))
    for warning in loss.warnings:
        log.warning("%s", warning)
    options = config.methods[method]
    require_margin(pairs, loss)
    pairs = without_missing_margins(pairs)
    pairs = add_trust(pairs, options.weights, loss)
    pairs, loss = add_weight(adjust_margins(pairs, options.weights), loss)
    trainer = make_trainer(
        normalise_weights(pairs, options.weights), config, loss, output, seed=seed, tau=tau,
        reference_cache=reference_cache, remedy=options.remedy, token_mask=options.token_mask,
        tilt=options.weights.tilt if options.weights else None,
    )  # fmt: skip
    show_pair(trainer.train_dataset[0], trainer.processing_class)
    trainer.in_background = config.async_checkpoints
    last = from_main_process(lambda: last_whole_checkpoint(checkpoints))
    if last is not None:
        log.info("train %s: resuming from %s", method, last)
    show_progress(trainer, f"train {method}")
    probe = attach_probe(trainer, config, output / ENTANGLEMENT)
    with stoppable(trainer) as notice:
        trainer.train(resume_from_checkpoint=last)
        notice.check()
        if trainer.is_fsdp_enabled:  # its checkpoints may be in parts, the model is not
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(output / MODEL))
        if trainer.is_world_process_zero():
            (output / MODEL / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            _order_adapter(output / MODEL / ADAPTER)
            write_json(output / HISTORY, _history(trainer, method, options, probe))
            _finish_checkpoints(checkpoints, config)


def _order_adapter(file: Path) -> None:
    """Sort the module names that peft keeps as a set, so that the same run leaves the same bytes in every process."""
    if file.exists():
        config = read_json(file)
        ordered = {name: sorted(config[name]) for name in SETS if isinstance(config.get(name), list)}
        write_json(file, config | ordered)


def _history(
    trainer: PreferenceTrainer, method: str, options: LossSection, probe: EntanglementCallback | None
) -> dict[str, Any]:
    """What is kept of a finished training: its loss, every logged step, and what was measured or learned beside.

    A resumed training has the steps before its stop from a checkpoint, which keeps their values in this order.
    """
    history = [dict(sorted(entry.items())) for entry in trainer.state.log_history if "loss" in entry]
    found: dict[str, Any] = {"method": method, "loss": options.model_dump(), "history": history}
    if probe is not None:
        found["entanglement"] = probe.records
    if trainer.token_mask is not None:
        found["token_mask"] = {
            side: [(trainer.processing_class.decode([token]), weight) for token, weight in tokens]
            for side, tokens in trainer.token_mask.extremes(MASK_SHOWN).items()
        }
    return found


def _finish_checkpoints(checkpoints: Path, config: TrainSection) -> None:
    """Remove checkpoints that only a stop has left; of those that ``save_strategy`` asks for keep the models.

    What only a resumed training needs (optimizer, schedule, random state: pickles and logs) goes.
    """
    if config.trainer.get("save_strategy", "no") == "no":
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    for pattern in OF_RESUMING:
        for file in checkpoints.rglob(pattern):
            file.unlink()
    for part in checkpoints.glob(f"*/{OPTIMIZER_PARTS}"):
        shutil.rmtree(part)
    for file in checkpoints.rglob(ADAPTER):
        _order_adapter(file)


def attach_probe(trainer: PreferenceTrainer, config: TrainSection, file: Path) -> EntanglementCallback | None:
    """A callback on ``trainer`` where the run asks for one and it can be had."""
    if config.entanglement is None:
        return None
    if trainer.loss.spec.function is None or trainer.accelerator.num_processes > 1 or not trainer.precompute_ref_logps:
        raise ConfigError(
            "train.entanglement: needs one process, precomputed reference log-probs and a loss other than beta_dpo",
            code="entanglement-config",
            hint="leave it out, and measure the trained policy with `align entangle report`",
        )
    count = min(config.entanglement.probes, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(count)])
    probes = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
    callback = EntanglementCallback(
        trainer.model, probes, trainer.loss, config.entanglement.every, file, lambda: trainer.latest_inputs,
        layout=trainer.layout,
    )  # fmt: skip
    trainer.add_callback(callback)
    return callback


def make_trainer(
    pairs: Dataset,
    config: TrainSection,
    loss: BoundLoss,
    output: Path,
    *,
    seed: int,
    tau: float,
    reference_cache: Path | None,
    remedy: RemedySection | None = None,
    token_mask: TokenMaskSection | None = None,
    tilt: TiltSection | None = None,
) -> PreferenceTrainer:
    """A PreferenceTrainer ready to train; see ``train_policy``."""
    check_adapter(config)
    transformers.set_seed(seed)
    args = build_trainer_args(
        DPOConfig,
        {
            # A mask reads the reference token by token in every step, which only an adapter can be taken off for.
            "precompute_ref_log_probs": token_mask is None or config.peft is not None,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        | config.trainer,
        path="train.trainer",
        forced={"output_dir": str(output / CHECKPOINTS), "seed": seed},
        pairs_per_step=config.pairs_per_step,
    )
    with refusals("train"):
        return PreferenceTrainer(
            loss=loss,
            tau=tau,
            reference_cache=reference_cache,
            layout=config.layout,
            max_tokens=config.max_tokens_per_device,
            remedy=remedy,
            token_mask=token_mask,
            tilt=tilt,
            model=load_policy(
                config.model,
                trust_remote_code=args.trust_remote_code,
                trainable=True,
                **(args.model_init_kwargs or {"dtype": "float32"}),
            ),
            args=args,
            train_dataset=pairs,
            processing_class=load_tokenizer(config.model, trust_remote_code=args.trust_remote_code),
            peft_config=build_lora(config.peft, path="train.peft", task_type="CAUSAL_LM"),
        )
