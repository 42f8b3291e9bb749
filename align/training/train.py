"""Train one policy under one loss and save it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from transformers.trainer import TRAINING_ARGS_NAME
from trl import DPOTrainer

from align.config import LossSection, RemedySection, TiltSection, TokenMaskSection, TrainSection
from align.data.training_pairs import report_in_sample
from align.distributed import process_rank
from align.entanglement.callback import EntanglementCallback
from align.errors import ConfigError
from align.io.console import log
from align.io.files import read_json, write_json
from align.losses.margin_weights import MADPO_TAU
from align.losses.spec import BoundLoss
from align.losses.sums import bind_section
from align.models.folders import ADAPTER
from align.models.loading import load_policy, load_tokenizer
from align.training.adapters import check_adapter
from align.training.base.arguments import build_lora, refusals
from align.training.base.checkpoints import OPTIMIZER_SHARDS
from align.training.base.resume import STEP
from align.training.columns import check_weights, prepare_pairs
from align.training.preview import show_pair
from align.training.reference import REFERENCE_FILE
from align.training.settings import check_probe, check_settings, policy_args
from align.training.trainer import PreferenceTrainer

CHECKPOINTS = "checkpoints"
MODEL = "model"
HISTORY = "history.json"
ENTANGLEMENT = "entanglement.json"
RESUME_FILES = (
    "*.pt", "*.pth", "*.bin", "trainer_state.json", STEP, "loss_state.json", "token_mask.safetensors", "README.md",
    REFERENCE_FILE,
)  # fmt: skip
"""Files of a checkpoint that only a resumed training reads."""
MODULE_LISTS = ("target_modules", "exclude_modules", "modules_to_save")
"""Keys of an adapter's config that peft keeps as sets."""
IGNORED_KWARGS = "The `model_init_kwargs` will be ignored."
"""trl's warning about a model that is loaded already; ``make_trainer`` has applied them."""
MASK_SHOWN = 40
"""Tokens with the largest and with the smallest weights of a learned mask that go into the history."""


def bind(method: str, config: LossSection) -> BoundLoss:
    """Return the loss of ``train.methods.<method>`` with its parameters checked.

    Raises:
        ConfigError: unknown loss or parameter, value out of range, a remedy, mask or weight that does not fit the loss.
    """
    try:
        loss = bind_section(config)
    except ConfigError as error:
        raise ConfigError(f"train.methods.{method}: {error.message}", code=error.code, hint=error.hint) from None
    if (config.remedy or config.token_mask) and not loss.spec.from_logps:
        raise ConfigError(
            f"train.methods.{method}: {loss.spec.name} compares pairs or reads tokens, and a remedy or a mask needs a "
            "loss of the log-probs of one pair",
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

    Raises:
        AlignError: the configuration, the model or the pairs have a problem that the user can fix.
    """
    if (output / HISTORY).exists():
        log.info("train %s: already trained (%s)", method, output / MODEL)
        if process_rank() == 0:
            _finish_checkpoints(output / CHECKPOINTS, config)
        return
    if process_rank() == 0:
        report_in_sample(pairs, f"train {method}")
    options = config.methods[method]
    loss = bind(method, options)
    tau = loss.parameter("tau", MADPO_TAU)
    for warning in loss.warnings:
        log.warning("%s", warning)
    pairs, loss = prepare_pairs(pairs, options.weights, loss)
    trainer = make_trainer(
        pairs, config, loss, output, seed=seed, tau=tau, reference_cache=reference_cache, remedy=options.remedy,
        token_mask=options.token_mask, tilt=options.weights.tilt if options.weights else None,
    )  # fmt: skip
    show_pair(trainer.train_dataset[0], trainer.processing_class)
    trainer.async_checkpoints = config.async_checkpoints
    probe = attach_probe(trainer, config, output / ENTANGLEMENT)
    with trainer.trained(f"train {method}"):
        _save(trainer, output / MODEL)
        if trainer.is_world_process_zero():
            write_json(output / HISTORY, _history(trainer, method, options, probe))
            _finish_checkpoints(output / CHECKPOINTS, config)


def _save(trainer: PreferenceTrainer, folder: Path) -> None:
    """Write the trained model or adapter; every process calls this."""
    if trainer.is_fsdp_enabled:  # checkpoints may be sharded, the model is not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        _order_adapter(folder / ADAPTER)


def _order_adapter(file: Path) -> None:
    """Sort the module names that peft keeps as sets, so that the same run writes the same bytes in every process."""
    if file.exists():
        config = read_json(file)
        ordered = {name: sorted(config[name]) for name in MODULE_LISTS if isinstance(config.get(name), list)}
        write_json(file, config | ordered)


def _history(
    trainer: PreferenceTrainer, method: str, options: LossSection, probe: EntanglementCallback | None
) -> dict[str, Any]:
    """Return the record of a finished training: its loss, every logged step, probe measurements, the learned mask.

    Metrics are sorted by name, as in the steps that a resumed training reads from its checkpoint.
    """
    history = [dict(sorted(entry.items())) for entry in trainer.state.log_history if "loss" in entry]
    record: dict[str, Any] = {"method": method, "loss": options.model_dump(), "history": history}
    if probe is not None:
        record["entanglement"] = probe.records
    if trainer.token_mask is not None:
        record["token_mask"] = {
            side: [(trainer.processing_class.decode([token]), weight) for token, weight in tokens]
            for side, tokens in trainer.token_mask.extremes(MASK_SHOWN).items()
        }
    return record


def _finish_checkpoints(checkpoints: Path, config: TrainSection) -> None:
    """Remove the checkpoints; if ``save_strategy`` asks for them, keep their models.

    Files that only a resumed training reads (optimizer, schedule, random state: pickles and logs) are removed.
    """
    if config.trainer.get("save_strategy", "no") == "no":
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    for pattern in RESUME_FILES:
        for file in checkpoints.rglob(pattern):
            file.unlink()
    for shards in checkpoints.glob(f"*/{OPTIMIZER_SHARDS}"):
        shutil.rmtree(shards)
    for file in checkpoints.rglob(ADAPTER):
        _order_adapter(file)


def attach_probe(trainer: PreferenceTrainer, config: TrainSection, file: Path) -> EntanglementCallback | None:
    """Add a callback that measures gradient entanglement to ``trainer`` if the configuration asks for it.

    Raises:
        ConfigError: several processes, reference log-probs that are not precomputed, or a loss that compares pairs or
            reads tokens.
    """
    if config.entanglement is None:
        return None
    check_probe(
        trainer.loss, processes=trainer.accelerator.num_processes, precomputed=trainer.precompute_ref_logps
    )  # fmt: skip
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
    """Return a PreferenceTrainer that is ready to train; see ``train_policy``."""
    check_adapter(config)
    transformers.set_seed(seed)
    masked = token_mask is not None or loss.spec.tokens == "reference"
    args = policy_args(config, {"output_dir": str(output / CHECKPOINTS), "seed": seed}, masked=masked)
    check_settings(config, loss, args, masked=masked)
    with refusals("train"), _without_warning(IGNORED_KWARGS):
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
                **({"dtype": "float32"} | (args.model_init_kwargs or {})),
            ),
            args=args,
            train_dataset=pairs,
            processing_class=load_tokenizer(config.model, trust_remote_code=args.trust_remote_code),
            peft_config=build_lora(config.peft, path="train.peft", task_type="CAUSAL_LM"),
        )


@contextmanager
def _without_warning(text: str) -> Iterator[None]:
    """Keep a warning of trl's that does not hold here from the log."""
    logger = logging.getLogger(DPOTrainer.__module__)

    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
