"""Train a reward model under the configured objective and save it."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TrlRewardConfig

from align.config import RewardSection
from align.data.table_facts import table_facts
from align.data.training_pairs import write_record
from align.data.votes import refuse_without_majority
from align.distributed import from_main_process, process_rank, wait_until
from align.io.console import log
from align.io.files import atomic_folder
from align.io.stage import versions
from align.models.model_card import REWARD_MODEL, TrainingFacts, base_model_id, papers_of, write_card
from align.training.adapters import check_biases_merge, check_reward_adapter
from align.training.base.arguments import build_lora, build_trainer_args, refusals
from align.training.base.tracked_runs import tracked
from align.training.base.trackers import TrackedRun
from reward_models.covariates import Coefficients
from reward_models.linear_heads import train_head
from reward_models.loading import load_reward_model, note_text_pair, pad_as_trained, reads_text_pairs
from reward_models.preparation import prepare_pairs
from reward_models.registry import VOTE_OBJECTIVES, objective_columns, resolve_objective
from reward_models.tie_parameter import TieParameter
from reward_models.trainer import RewardTrainer

CONFIG = "config.json"
"""File whose presence marks a model folder as complete."""


def train_reward_model(
    train: Dataset,
    config: RewardSection,
    output: Path,
    *,
    seed: int,
    run: TrackedRun | None = None,
    features: Path | None = None,
) -> None:
    """Train on a pair table and save model and tokenizer (safetensors; an adapter is merged) into ``output``.

    The head is initialized under ``seed``. Pairs of similar length share a batch, in groups that are drawn anew each
    epoch (``train_sampling_strategy: random`` for any order). A stopped training resumes from the last complete
    checkpoint next to ``output``; checkpoints are removed at the end. Under a launcher every process calls this.

    Args:
        train: pair table, with the columns that the objective reads; pairs whose prompts fill ``config.max_length``
            are left out, and their number is logged.
        config: backbone, head, objective, adapter, length and trl.RewardConfig fields.
        output: folder of the finished model; a folder with config.json is left as it is.
        seed: seed of the head, the adapter and the order of the pairs.
        run: names under which the trackers of ``report_to`` show the training.
        features: folder that keeps the features of a frozen backbone for further trainings; None: they are kept until
            this one is finished. ``head: full`` has none.

    Raises:
        AlignError: the configuration, the model or the pairs cannot be used.
    """
    checkpoints = output.with_name(output.name + "-checkpoints")
    if from_main_process((output / CONFIG).exists):
        log.info("reward model: already trained (%s)", output)
    elif config.head == "full":
        _train_full(train, config, output, checkpoints, seed, run)
    elif process_rank() == 0:
        refuse_without_majority(train, f"head {config.head} reads no votes", f"head: full with {VOTE_OBJECTIVES}")
        trained = train_head(train, config, seed=seed, cache=features or checkpoints)
        save_model(*trained, output, train, _head_facts(train, config, seed), start=config.model)
    if process_rank() == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    wait_until((output / CONFIG).exists)


def _train_full(
    train: Dataset, config: RewardSection, output: Path, checkpoints: Path, seed: int, run: TrackedRun | None
) -> None:
    """Train head and backbone (or its adapter) and save them."""
    objective = resolve_objective(config.objective)
    objective_columns(train, objective)
    check_reward_adapter(config.peft)
    args = build_trainer_args(
        TrlRewardConfig,
        {"save_strategy": "no", "logging_steps": 20, "train_sampling_strategy": "group_by_length", **config.trainer},
        path="reward.trainer",
        forced={"output_dir": str(checkpoints), "seed": seed, "max_length": config.max_length},
        pairs_per_step=config.pairs_per_step,
    )
    transformers.set_seed(seed)
    model, tokenizer = _load(config)
    prepared = prepare_pairs(
        train, model, tokenizer, objective, max_length=config.max_length, length_column=args.length_column_name,
        covariates=config.covariates,
    )  # fmt: skip
    with refusals("reward"):
        trainer = RewardTrainer(
            model=model,
            args=args,
            train_dataset=prepared.table,
            processing_class=tokenizer,
            peft_config=build_lora(config.peft, path="reward.peft", task_type="SEQ_CLS"),
            objective=objective,
            tilt=config.tilt,
            sharpness=config.sharpness,
            covariates=config.covariates,
        )
    check_biases_merge(trainer.model)
    trainer.async_checkpoints = config.async_checkpoints
    trainer.data_facts = table_facts(prepared.pairs)
    trainer.extra_config |= config.model_dump(include={"tilt", "sharpness"}, exclude_none=True)
    with tracked(trainer, run), trainer.trained(f"reward model {output.name}"):
        trained = _gathered(trainer, config)
        if trained is not None:
            merged = trained.merge_and_unload() if config.peft is not None else trained
            save_model(
                merged,
                tokenizer,
                output,
                prepared.pairs,
                trainer.facts,
                start=config.model,
                ties=trainer.step_loss.ties,
                covariates=trainer.step_loss.covariates,
            )


def _load(config: RewardSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer; the model's configuration says how it is trained to read."""
    model, tokenizer = load_reward_model(config.model, trust_remote_code=config.trusts_remote_code, new_head=True)
    pad_as_trained(model, tokenizer)
    note_text_pair(model, reads_text_pairs(model, asked=config.text_pair))
    return model, tokenizer


def _gathered(trainer: RewardTrainer, config: RewardSection) -> Any:
    """Return the trained model on rank 0, None elsewhere; gathered shards are loaded into a new model."""
    sharded: bool = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else {}  # collective: every process calls it
    if process_rank() > 0:
        return None
    if not sharded:
        return trainer.accelerator.unwrap_model(trainer.model)
    model, _ = _load(config)
    pad_as_trained(model, trainer.processing_class)
    adapter = build_lora(config.peft, path="reward.peft", task_type="SEQ_CLS")
    trained = model if adapter is None else get_peft_model(model, adapter)
    trained.load_state_dict(weights)
    return trained


def _head_facts(train: Dataset, config: RewardSection, seed: int) -> TrainingFacts:
    """What the card of a model with a fitted head says."""
    data = table_facts(train)
    return TrainingFacts(
        kind=REWARD_MODEL,
        method=config.head,
        summary="a linear head, fitted by Bradley-Terry to the frozen features of the backbone",
        sources=papers_of(train_head.__doc__),
        parameters={},
        base_model=base_model_id(config.model),
        pairs=data.pairs,
        fingerprint=data.fingerprint,
        margins=None,
        settings={"max_length": config.max_length, "seed": seed},
        versions=versions(),
    )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    train: Dataset,
    facts: TrainingFacts,
    *,
    start: str,
    ties: TieParameter | None = None,
    covariates: Coefficients | None = None,
) -> None:
    """Write a model folder with its card and the record of its training pairs, completely or not at all.

    Args:
        model: trained.
        tokenizer: its own.
        output: the folder.
        train: the training pairs.
        facts: for the card.
        start: what the training started from, whose own training pairs are recorded as well.
        ties: the tie parameter, if the objective learned one.
        covariates: their coefficients, if the training had any.
    """
    with atomic_folder(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_record(train, temporary, start)
        if ties is not None:
            ties.write(temporary)
        if covariates is not None:
            covariates.write(temporary)
        write_card(temporary, facts, adapter=False)
