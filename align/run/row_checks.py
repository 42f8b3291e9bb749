"""Checks of a run that need its rows: whether the chat templates take the messages of every pair and prompt."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from align.config import RewardSection, RunConfig, TrainSection
from align.data.pairs import load_pairs
from align.models.message_checks import check_pairs_of, check_prompts_of, check_turns_of
from align.run.watch import split_share, without_trained
from align.training.held_out import HeldOut
from align.training.held_out_settings import chooses


def check_prompt_rows(config: RunConfig, prompts: Sequence[Any]) -> None:
    """Check the prompts that the policy completes; with a reward model, also followed by an answer.

    Raises:
        ModelError, DataError: see ``check_prompts_of``.
    """
    for part in (config.train, config.reward):
        if part is not None:
            check_prompts_of(
                prompts, [part.model], answered=part is config.reward, trust_remote_code=part.trusts_remote_code,
                text_pair=isinstance(part, RewardSection) and part.text_pair,
            )  # fmt: skip


def check_table_rows(config: RunConfig) -> None:
    """Read the pair tables of a run and check them.

    Raises:
        DataError: a table cannot be used; see also ``check_pair_rows``.
    """
    pairs = None if config.pairs is None else load_pairs(config.pairs)
    if pairs is not None:
        check_pair_rows(config, pairs)
    _check_held_out(config, pairs)
    for source in (config.reward.pairs, config.reward.eval_pairs) if config.reward is not None else ():
        if source is not None:
            check_pair_rows(config, load_pairs(source), rewards=True)


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
        held_out = held_out if pairs is None else without_trained(held_out, pairs, section)
    elif pairs is not None:
        held_out = split_share(pairs, section, config.seed)[1]
    if held_out is not None:
        HeldOut.of(held_out, seed=config.seed, choose=chooses(config.train))


def check_pair_rows(config: RunConfig, pairs: Dataset, *, rewards: bool = False) -> None:
    """Check pairs against the models of a run that read them; ``rewards``: the reward model alone does.

    Raises:
        ModelError, DataError: see ``check_pairs_of``.
    """
    parts: list[TrainSection | RewardSection | None] = [None if rewards else config.train, config.reward]
    for part in parts:
        if part is not None:
            text_pair = isinstance(part, RewardSection) and part.text_pair
            check_pairs_of(pairs, [part.model], trust_remote_code=part.trusts_remote_code, text_pair=text_pair)
        if isinstance(part, TrainSection):
            check_turns_of(pairs, part.model, part.turns, trust_remote_code=part.trusts_remote_code)
    if config.filter is not None and config.filter.ood is not None and not rewards:
        ood = config.filter.ood
        check_pairs_of(pairs, [ood.model], trust_remote_code=ood.trust_remote_code, text_pair=ood.text_pair)
