"""Checks of a run that need its rows: whether the chat templates take the messages of every pair and prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.config import PairsSection, RewardSection, RunConfig, TrainSection
from align.data.checked_pairs import add_checked, load_checked, without_checked, without_held_out
from align.data.pairs import load_pairs
from align.data.splits import folds_by_prompt, split_by_prompt
from align.data.thumbs import has_thumbs, refuse_thumbs
from align.errors import ConfigError, DataError
from align.models.message_checks import check_pairs_of, check_prompts_of, check_turns_of
from align.models.row_lengths import check_lengths_of
from align.models.tokenization import MAX_LENGTH
from align.run.watch import split_share, without_trained
from align.training.columns import refuse_no_weight, require_margin
from align.training.held_out import HeldOut
from align.training.held_out_settings import chooses
from align.training.loss_choice import bind
from reward_models.named_judges import kind_of, model_of


def check_prompt_rows(config: RunConfig, prompts: Sequence[Any], judged: Sequence[Any]) -> None:
    """Check the prompts that the policy completes; with a reward model, also followed by an answer.

    Args:
        config: the run.
        prompts: all that the policy completes.
        judged: those of them whose completions the judges of the run see.

    Raises:
        ModelError, DataError: see ``check_prompts_of``.
    """
    for part in (config.train, config.reward):
        if part is not None:
            check_prompts_of(
                prompts, [part.model], answered=part is config.reward, trust_remote_code=part.trusts_remote_code,
                text_pair=isinstance(part, RewardSection) and part.text_pair,
            )  # fmt: skip
    for judge in config.evaluate.judge if config.evaluate is not None else ():
        if kind_of(judge.name) in ("reward model", "reward-server") and Path(model_of(judge.name)).is_dir():
            check_prompts_of(
                judged, [model_of(judge.name)], answered=True, trust_remote_code=judge.trust_remote_code,
                text_pair=judge.text_pair,
            )  # fmt: skip


def check_table_rows(config: RunConfig) -> None:
    """Read the pair tables of a run and check them, also whether they can be split as the run will.

    Raises:
        DataError: a table cannot be used; see also ``check_pair_rows`` and ``split_for_reward``.
    """
    reward = config.reward
    heldout = None if reward is None or reward.eval_pairs is None else load_pairs(reward.eval_pairs)
    if heldout is not None:
        check_pair_rows(config, heldout, rewards=True)
    policy_pairs = None if config.pairs is None else load_pairs(config.pairs, thumbs=True)
    if policy_pairs is not None:
        check_loss_columns(config, policy_pairs)
    _check_held_out(config, policy_pairs if config.pairs is None else with_checked(config, config.pairs, policy_pairs))
    for source, rewards in ((config.pairs, False), (None if reward is None else reward.pairs, True)):
        if source is None:
            continue
        pairs = policy_pairs if policy_pairs is not None and not rewards else load_pairs(source, thumbs=True)
        check_pair_rows(config, pairs, rewards=rewards)
        if reward is not None and (rewards or reward.pairs is None):
            split_with_checked(config, source, pairs, heldout)


def with_checked(config: RunConfig, source: PairsSection, pairs: Dataset, *, rewards: bool = False) -> Dataset:
    """Pairs to train on, with the checked pairs of their section among them if it names any.

    Args:
        config: the run.
        source: of the pairs.
        pairs: its pairs.
        rewards: the reward model alone is trained on them.

    Raises:
        DataError: the checked pairs cannot be used; see also ``check_pair_rows``.
    """
    checked = load_checked(source)
    if checked is None or source.checked is None:
        return pairs
    check_pair_rows(config, checked, rewards=rewards)
    where = f"pairs.checked: {source.checked.path}"
    return add_checked(without_checked(pairs, checked, where).pairs, checked, source.checked.share, where)


def split_with_checked(
    config: RunConfig, source: PairsSection, pairs: Dataset, heldout: Dataset | None
) -> tuple[Dataset, Dataset]:
    """As ``split_for_reward``; the checked pairs of the source, if any, are trained on and never held out.

    Raises:
        DataError: see ``split_for_reward`` and ``with_checked``.
    """
    checked = load_checked(source)
    if checked is None or source.checked is None:
        return split_for_reward(config, source, pairs, heldout)
    assert config.reward is not None
    check_pair_rows(config, checked, rewards=source is config.reward.pairs)
    where = f"pairs.checked: {source.checked.path}"
    others, heldout = split_for_reward(config, source, without_checked(pairs, checked, where).pairs, heldout)
    checked = without_held_out(checked, heldout, where)
    return add_checked(others, checked, source.checked.share, where), heldout


def split_for_reward(
    config: RunConfig, source: PairsSection, pairs: Dataset, heldout: Dataset | None
) -> tuple[Dataset, Dataset]:
    """The pairs that a reward model is trained on and those that are held out.

    Args:
        config: the run.
        source: of the pairs, for messages.
        pairs: of the reward model.
        heldout: those of ``reward.eval_pairs``; None: held out of ``pairs``.

    Raises:
        DataError: too few pairs are left to train on, to hold out, or for the folds.
    """
    reward = config.reward
    assert reward is not None
    train = pairs
    if heldout is None:
        train, heldout = split_by_prompt(pairs, reward.eval_fraction, config.seed)
    if len(train) == 0 or len(heldout) == 0:
        raise DataError(
            f"{source.path}: {len(pairs)} pairs leave {len(train)} to train on and {len(heldout)} held out",
            code="data-too-few",
            hint="give more prompts, another reward.eval_fraction, or reward.eval_pairs",
        )
    filled = len(set(folds_by_prompt(train, reward.folds, config.seed))) if reward.folds else 0
    if filled < reward.folds:
        raise DataError(
            f"{source.path}: {len(train)} pairs to train on fill {filled} parts, fewer than reward.folds: "
            f"{reward.folds}, because pairs that share texts stay together",
            code="data-too-few",
            hint="give pairs of more prompts, or fewer folds",
        )
    return train, heldout


def _check_held_out(config: RunConfig, pairs: Dataset | None) -> None:
    """Read the held-out pairs, and divide or compare them with the pairs that policies are trained on.

    Args:
        config: the run.
        pairs: the policy's pairs; None: they are yet to be sampled.

    Raises:
        DataError: too few pairs for a share or for two halves, or pairs that are trained on.
    """
    section = None if config.train is None else config.train.eval_pairs
    if config.train is None or section is None:
        return
    held_out = None
    if section.path:
        held_out = load_pairs(section)
        check_pair_rows(config, held_out)
        check_loss_columns(config, held_out)
        held_out = held_out if pairs is None else without_trained(held_out, pairs, section)
    elif pairs is not None:
        held_out = split_share(pairs, section, config.seed)[1]
    if held_out is not None:
        HeldOut.of(held_out, seed=config.seed, choose=chooses(config.train))


def check_loss_columns(config: RunConfig, pairs: Dataset) -> None:
    """Check that pairs have the margins that the losses need, unless a reward model of the run gives them, and weights.

    Raises:
        ConfigError: there is no column ``margin``.
        DataError: a pair has no margin, or every pair has the weight 0.
    """
    if config.train is None:
        return
    refuse_no_weight(pairs)
    if config.reward is None:
        for method, loss in config.train.methods.items():
            require_margin(pairs, bind(method, loss))


def check_thumbs(config: RunConfig, pairs: Dataset, *, rewards: bool) -> None:
    """Check that single responses with thumbs come to no part of a run that compares two responses.

    Args:
        config: the run.
        pairs: a table of it.
        rewards: the reward model alone reads it.

    Raises:
        DataError: names the part.
        ConfigError: held-out rows of thumbs that would be ranked.
    """
    if not has_thumbs(pairs):
        return
    reward = config.reward
    if not rewards and config.train is not None:
        for method, own in config.train.methods.items():
            loss = bind(method, own)
            if not loss.spec.unpaired:
                refuse_thumbs(pairs, f"pairs, for the loss {loss.spec.name} of train.methods.{method}")
    if not rewards:
        for name, section in (("filter", config.filter), ("reward (take them as reward.pairs)", reward)):
            if section is not None:
                refuse_thumbs(pairs, f"pairs, for {name}")
    if reward is not None and rewards:
        if reward.objective.name != "thumbs":
            refuse_thumbs(pairs, f"pairs, for reward.objective {reward.objective.name}")
        if reward.eval_pairs is None or reward.folds or reward.head != "full":
            raise ConfigError(
                "reward: found thumbs in its pairs, expected `eval_pairs` of pairs to measure it on, no `folds`, and "
                "`head: full`: a single response has no margin",
                code="thumbs",
                hint="set reward.eval_pairs, and leave folds and head out",
            )


def check_pair_rows(config: RunConfig, pairs: Dataset, *, rewards: bool = False) -> None:
    """Check pairs against the models of a run that read them; ``rewards``: the reward model alone does.

    Raises:
        ModelError, DataError: see ``check_pairs_of``.
    """
    check_thumbs(config, pairs, rewards=rewards)
    parts: list[TrainSection | RewardSection | None] = [None if rewards else config.train, config.reward]
    for part in parts:
        if part is not None:
            text_pair = isinstance(part, RewardSection) and part.text_pair
            check_pairs_of(pairs, [part.model], trust_remote_code=part.trusts_remote_code, text_pair=text_pair)
        if isinstance(part, TrainSection):
            check_turns_of(pairs, part.model, part.turns, trust_remote_code=part.trusts_remote_code)
            if config.filter is None:  # a filter may drop the long ones; training then counts the rest
                longest = part.trainer.get("max_length", MAX_LENGTH)
                multiple = part.trainer.get("pad_to_multiple_of")
                check_lengths_of(
                    pairs, part.model, longest, trust_remote_code=part.trusts_remote_code, multiple=int(multiple or 0)
                )
    if config.filter is not None and config.filter.ood is not None and not rewards:
        ood = config.filter.ood
        check_pairs_of(pairs, [ood.model], trust_remote_code=ood.trust_remote_code, text_pair=ood.text_pair)
