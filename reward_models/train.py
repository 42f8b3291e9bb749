"""Training of a reward model on trl's RewardTrainer, under the objective that the run names."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TrlRewardConfig

from align.config import RewardSection
from align.distributed import from_main_process, process_rank, wait_until
from align.io.console import log
from align.io.files import atomic_folder
from align.training.base.arguments import build_lora, build_trainer_args, refusals
from align.training.base.checkpoints import last_whole_checkpoint
from align.training.base.progress import show_progress
from align.training.base.stopping import stoppable
from reward_models.linear_heads import train_head
from reward_models.loading import (
    TEXT_PAIR,
    fitting_length,
    load_reward_model,
    note_text_pair,
    pad_as_trained,
    reads_text_pairs,
    takes_segments,
)
from reward_models.registry import objective_columns, resolve_objective
from reward_models.tokenization import SegmentedIds, pair_texts, second_starts, told_apart
from reward_models.trainer import SEGMENTS, ObjectiveRewardTrainer

CONFIG = "config.json"
"""A model folder that holds it is whole."""


def train_reward_model(train: Dataset, config: RewardSection, output: Path, *, seed: int) -> None:
    """Train on a pair table and save model and tokenizer (safetensors; an adapter is merged) into ``output``.

    The head is drawn under ``seed``. Pairs of like length share a batch, which of them meet is drawn anew each epoch
    (``train_sampling_strategy: random`` for any order). A stopped training resumes from the last whole checkpoint
    beside ``output``; checkpoints are removed when it is done. Under a launcher all processes call this together.

    Args:
        train: pair table, with the columns that the objective reads; pairs whose prompts fill ``config.max_length``
            are left out, and how many is said.
        config: backbone, head, objective, adapter, length and trl.RewardConfig fields.
        output: folder of the finished model; a folder that holds config.json is left as it is.
        seed: seed of the head, the adapter and the order of the pairs.

    Raises:
        AlignError: the configuration, the model or the pairs cannot be used.
    """
    checkpoints = output.with_name(output.name + "-checkpoints")
    if from_main_process((output / CONFIG).exists):
        log.info("reward model: there already (%s)", output)
    elif config.head == "full":
        _train_whole(train, config, output, checkpoints, seed)
    elif process_rank() == 0:
        save_model(*train_head(train, config, seed=seed, cache=checkpoints), output)
    if process_rank() == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    wait_until((output / CONFIG).exists)


def _train_whole(train: Dataset, config: RewardSection, output: Path, checkpoints: Path, seed: int) -> None:
    """Train head and backbone (or its adapter) and save them."""
    objective = resolve_objective(config.objective)
    columns = objective_columns(train, objective)
    args = build_trainer_args(
        TrlRewardConfig,
        {"save_strategy": "no", "logging_steps": 20, "train_sampling_strategy": "group_by_length", **config.trainer},
        path="reward.trainer",
        forced={"output_dir": str(checkpoints), "seed": seed, "max_length": config.max_length},
        pairs_per_step=config.pairs_per_step,
    )
    transformers.set_seed(seed)
    model, tokenizer = _load(config)
    most = fitting_length(model, config.max_length)
    read = pair_texts(train, tokenizer, most, text_pair=getattr(model.config, TEXT_PAIR, False))
    kept = told_apart(read.alike, most)
    if len(kept) < len(train):
        train, read = train.select(kept), read.of(kept)
        columns = objective_columns(train, objective)
    chosen, rejected = read.ids[: len(train)], read.ids[len(train) :]
    ids = {"chosen_ids": chosen, "rejected_ids": rejected}
    length = [max(len(one), len(other)) for one, other in zip(chosen, rejected, strict=True)]
    if takes_segments(model) and any(isinstance(row, SegmentedIds) for row in read.ids):
        columns |= dict(zip(SEGMENTS, (second_starts(chosen), second_starts(rejected)), strict=True))
    with refusals("reward"):
        trainer = ObjectiveRewardTrainer(
            objective=objective,
            tilt=config.tilt,
            sharpness=config.sharpness,
            ids=[str(name) for name in (train["id"] if "id" in train.column_names else range(len(train)))],
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({**ids, **columns, args.length_column_name: length}),
            processing_class=tokenizer,
            peft_config=build_lora(config.peft, path="reward.peft", task_type="SEQ_CLS"),
        )
    trainer.in_background = config.async_checkpoints
    last = from_main_process(lambda: last_whole_checkpoint(checkpoints))
    if last is not None:
        log.info("reward model %s: resuming from %s", output.name, last)
    show_progress(trainer, f"reward model {output.name}")
    with stoppable(trainer) as notice:
        trainer.train(resume_from_checkpoint=last)
        notice.check()
        trained = _gathered(trainer, config)
        if trained is not None:
            save_model(trained.merge_and_unload() if config.peft is not None else trained, tokenizer, output)


def _load(config: RewardSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer; the model's configuration says how it is trained to read."""
    model, tokenizer = load_reward_model(config.model, trust_remote_code=config.trusts_remote_code, new_head=True)
    pad_as_trained(model, tokenizer)
    note_text_pair(model, reads_text_pairs(model, asked=config.text_pair))
    return model, tokenizer


def _gathered(trainer: ObjectiveRewardTrainer, config: RewardSection) -> Any:
    """The trained model on the first process, None on the others; what was sharded is put into the model anew."""
    sharded: bool = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else {}  # every process gives its part
    if process_rank() > 0:
        return None
    if not sharded:
        return trainer.accelerator.unwrap_model(trainer.model)
    model, _ = _load(config)
    pad_as_trained(model, trainer.processing_class)
    adapter = build_lora(config.peft, path="reward.peft", task_type="SEQ_CLS")
    whole = model if adapter is None else get_peft_model(model, adapter)
    whole.load_state_dict(weights)
    return whole


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a model folder, whole or not at all."""
    with atomic_folder(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
