"""Checks of a run before any stage starts."""

from pathlib import Path
from typing import Any

from align.config import RunConfig, TrainSection
from align.data.prompts import load_prompts
from align.errors import ModelError
from align.models.folders import check_model_folder
from align.models.loading import load_tokenizer
from align.training.base.arguments import build_lora, build_trainer_args
from align.training.train import bind
from reward_models.loading import check_class
from reward_models.registry import resolve_objective


def check_config(config: RunConfig) -> None:
    """Bind every loss and trainer field, look at every prompt file and model folder, before a model loads.

    Raises:
        AlignError: the first thing found wrong.
    """
    from trl import RewardConfig as TrlRewardConfig

    forced = {"output_dir": str(config.folder / "check")}
    if config.train is not None:
        check_train(config.train, forced)
    if config.reward is not None:
        resolve_objective(config.reward.objective)
        build_lora(config.reward.peft, path="reward.peft", task_type="SEQ_CLS")
        build_trainer_args(
            TrlRewardConfig, config.reward.trainer, path="reward.trainer", forced=forced,
            pairs_per_step=config.reward.pairs_per_step,
        )  # fmt: skip
    prompts = [
        prompt for part in (config.sample, config.evaluate) if part is not None for prompt in load_prompts(part.prompts)
    ]
    check_models(config, conversational=not all(isinstance(prompt, str) for prompt in prompts))


def check_train(train: TrainSection, forced: dict[str, Any]) -> None:
    """Bind every loss, the adapter and the trainer's fields; ``forced`` are those that the program sets itself.

    Raises:
        ConfigError: the first thing found wrong.
    """
    from trl import DPOConfig

    for method, loss in train.methods.items():
        bind(method, loss)
    build_lora(train.peft, path="train.peft", task_type="CAUSAL_LM")
    build_trainer_args(
        DPOConfig, train.trainer, path="train.trainer", forced=forced, pairs_per_step=train.pairs_per_step
    )


def check_models(config: RunConfig, *, conversational: bool) -> None:
    """Look at the model folders of a run before any of them is loaded; hub ids are left to the loader.

    Args:
        config: the run.
        conversational: there are messages among the texts, which need a chat template.

    Raises:
        ModelError: a folder is not a model, its tokenizer does not belong to it, or lacks the template.
    """
    if config.filter is not None and config.filter.ood is not None:
        check_model_folder(config.filter.ood.model, rewards=True, head=True)
    for part in (config.train, config.reward):
        if part is None:
            continue
        check_model_folder(part.model, rewards=part is config.reward)
        if part is config.reward:
            check_class(part.model, part.trusts_remote_code)
        if not Path(part.model).is_dir():
            continue
        tokenizer = load_tokenizer(part.model, trust_remote_code=part.trusts_remote_code)
        if conversational and tokenizer.chat_template is None:
            raise ModelError(
                f"{part.model}: no chat template, and the texts are lists of messages",
                code="no-chat-template",
                hint="use a model with a chat template, or plain text",
            )
