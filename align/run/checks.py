"""Checks of a run before any stage starts."""

from pathlib import Path
from typing import Any

from align.config import RunConfig, TrainSection
from align.data.prompts import load_prompts, section_prompts
from align.errors import ConfigError, ModelError
from align.filtering.options import check_options
from align.models.folders import check_model_folder, reads_sentence_pairs
from align.models.loading import load_tokenizer
from align.run.engines import engine_of
from align.run.row_checks import check_prompt_rows, check_table_rows
from align.run.watch import check_watch
from align.training.adapters import check_adapter, check_reward_adapter
from align.training.base.arguments import build_lora, build_trainer_args
from align.training.given_reference import check_reference
from align.training.loss_choice import bind
from align.training.model_arguments import check_model_arguments
from align.training.settings import check_settings, policy_args
from reward_models.loading import check_class
from reward_models.named_judges import check_judge
from reward_models.registry import resolve_objective


def check_config(config: RunConfig, *, tables: bool = False) -> None:
    """Check every loss, trainer field, prompt file and model folder before a model loads.

    Args:
        config: the run.
        tables: also read the pair tables, and check that the chat templates take their messages; the stages of the
            pairs do the same.

    Raises:
        AlignError: the first problem.
    """
    if config.filter is not None:
        check_options(config.filter)
    for judge in config.evaluate.judge if config.evaluate is not None else ():
        check_judge(judge)
    from trl import RewardConfig as TrlRewardConfig

    forced = {"output_dir": str(config.folder / "check")}
    if config.train is not None:
        check_train(config.train, forced)
        check_watch(config)
    if config.reward is not None:
        resolve_objective(config.reward.objective)
        build_lora(config.reward.peft, path="reward.peft", task_type="SEQ_CLS")
        check_reward_adapter(config.reward.peft)
        build_trainer_args(
            TrlRewardConfig, config.reward.trainer, path="reward.trainer", forced=forced,
            pairs_per_step=config.reward.pairs_per_step,
        )  # fmt: skip
    if config.train is not None:
        for section in (config.sample, config.evaluate):
            if section is not None:
                engine_of(config, section)
    judged = [] if config.evaluate is None else section_prompts(config.evaluate)
    samples = config.train.eval_samples if config.train is not None else None
    if samples is not None and samples.prompts is not None:
        judged = [*judged, *load_prompts(samples.prompts, samples.chat_template_kwargs)]
    prompts = [*([] if config.sample is None else section_prompts(config.sample)), *judged]
    check_models(config, conversational=not all(isinstance(prompt, str) for prompt in prompts))
    check_prompt_rows(config, prompts, judged)
    if tables:
        check_table_rows(config)


def check_train(train: TrainSection, forced: dict[str, Any]) -> None:
    """Check every loss, the adapter and the trainer's fields; ``forced`` are fields that the program sets itself.

    Raises:
        ConfigError: the first problem.
    """
    build_lora(train.peft, path="train.peft", task_type="CAUSAL_LM")
    check_adapter(train)
    losses = {method: bind(method, options) for method, options in train.methods.items()}
    for method, loss in losses.items():
        check_settings(train, loss, policy_args(train, method, loss, forced))
    check_reference(train, losses.values())


def check_models(config: RunConfig, *, conversational: bool) -> None:
    """Check the model folders of a run before any of them is loaded; the loader checks hub ids.

    Args:
        config: the run.
        conversational: some texts are lists of messages, which need a chat template.

    Raises:
        ConfigError: `pad_token` is not a token of the model.
        ModelError: a folder is not a model, its tokenizer does not fit the model, or the chat template is missing.
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
        if isinstance(part, TrainSection):
            check_model_arguments(part)
        tokenizer = load_tokenizer(part.model, trust_remote_code=part.trusts_remote_code)
        pad_token = part.trainer.get("pad_token")
        if pad_token is not None and pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"trainer.pad_token: found {pad_token!r}, expected a token of {part.model}",
                code="trainer-key",
                hint="leave it out: the tokenizer's own is used",
            )
        as_pairs = part is config.reward and (part.text_pair or reads_sentence_pairs(part.model))
        if conversational and not as_pairs and tokenizer.chat_template is None:
            raise ModelError(
                f"{part.model}: no chat template, and the texts are lists of messages",
                code="no-chat-template",
                hint="use a model with a chat template, or plain text",
            )
