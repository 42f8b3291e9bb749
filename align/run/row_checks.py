"""Checks of a run that need its rows: whether the chat templates take the messages of every pair and prompt."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from align.config import RewardSection, RunConfig, TrainSection
from align.data.pairs import load_pairs
from align.models.message_checks import check_pairs_of, check_prompts_of, check_turns_of


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
    if config.pairs is not None:
        check_pair_rows(config, load_pairs(config.pairs))
    for source in (config.reward.pairs, config.reward.eval_pairs) if config.reward is not None else ():
        if source is not None:
            check_pair_rows(config, load_pairs(source), rewards=True)


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
