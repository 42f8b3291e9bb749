"""Several reward models for one: the margin is their mean, ``margin_std`` how far they disagree.

The first member is the model folder itself, which loads as a plain reward model; the others lie in ``members/`` below.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import ClusterSection, RewardSection
from align.config.columns import SCORES, SPREAD, TEXT
from align.data.pairs import fingerprint, with_columns
from align.distributed import all_gather_objects, from_main_process, process_rank
from align.io.console import log
from align.io.hashing import digest
from align.models.folders import fingerprint_model
from align.sharding.shards import map_shards
from reward_models.calibration import MarginMap
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.score import ALIKE, REWARDS, RewardScorer, ScoreJob, tell_alike, with_rewards
from reward_models.train import train_reward_model

MEMBERS = "members"
SEED_STEP = 7919
SHARD = 512
"""Pairs that are lost at most when a scoring is stopped, and that a process or a worker is given at a time."""
KEY_DIGITS = 8


def train_members(train: Dataset, config: RewardSection, output: Path, *, seed: int) -> None:
    """Train ``config.ensemble`` reward models into ``output`` and ``output/members``; those that are there are kept.

    Their seeds differ, so their heads and the order of their pairs do. A head that is fitted to frozen features in
    closed form has no seed: members but the first see the pairs drawn with replacement (bagging).

    Args:
        train: pair table.
        config: reward model.
        output: folder of the first model.
        seed: of the first member.
    """
    train_reward_model(train, config, output, seed=seed)
    for number in range(1, config.ensemble):
        own = seed + SEED_STEP * number
        pairs = train
        if config.head != "full":
            rows = np.random.default_rng(own).integers(0, len(train), len(train))
            pairs = train.select(np.sort(rows))
        (output / MEMBERS).mkdir(exist_ok=True)
        train_reward_model(pairs, config, output / MEMBERS / str(number), seed=own)


def members(model: Path | str) -> list[Path | str]:
    """The model and the other members of its ensemble, in their order; of a hub id itself alone."""
    below = Path(model) / MEMBERS
    found = [folder for folder in below.iterdir() if folder.name.isdigit()] if below.is_dir() else []
    return [model, *sorted(found, key=lambda folder: int(folder.name))]


class EnsembleScorer:
    """The mean reward of a model and the other members of its ensemble; of a model without any, its reward.

    How many texts are cut before their response is said, by the first member's tokens.

    All members are in memory at once, so that any number of small calls loads each of them once.

    Args:
        model: folder or hub id.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text; longer ones are cut from the right.
        options: how the members are loaded and read texts.

    Raises:
        ModelError: a member cannot be used.
    """

    def __init__(
        self, model: Path | str, *, batch_tokens: int, max_length: int, options: LoadOptions = DEFAULTS
    ) -> None:
        self.scorers = [
            RewardScorer(member, batch_tokens=batch_tokens, max_length=max_length, options=options)
            for member in members(model)
        ]

    def score_completions(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Mean reward of each completion of the prompt beside it, float64 [N].

        Raises:
            ModelError: they are messages, and the model's tokenizer has no chat template.
        """
        unread = self.scorers[0].unread(prompts, completions).sum()
        if unread:
            log.warning("%d of %d completions are not read: their prompts fill max_length", unread, len(prompts))
        rewards = [scorer.score_completions(prompts, completions) for scorer in self.scorers]
        return np.asarray(np.mean(rewards, axis=0))

    def score_pairs(self, pairs: Dataset) -> Dataset:
        """The table with the mean rewards and their margin; ``margin_std`` where there are at least two members."""
        scored, alike = zip(*(scorer.score_and_tell(pairs) for scorer in self.scorers), strict=True)
        tell_alike(alike[0])
        return _averaged(pairs, scored)


def score_with(
    models: Sequence[Path | str],
    pairs: Dataset,
    folder: Path,
    *,
    batch_tokens: int,
    max_length: int,
    options: LoadOptions = DEFAULTS,
    calibration: MarginMap | None = None,
    cluster: ClusterSection | None = None,
) -> Dataset:
    """The table with the mean rewards of the models and their margin; ``margin_std`` where there are at least two.

    One model after the other is loaded and scores all pairs, so that one of them is in memory at a time. Under a
    launcher all processes call this together and share the work. How many pairs are cut alike is said.

    Args:
        models: at least one.
        pairs: pair table.
        folder: keeps finished shards until all are, so that a stopped scoring goes on; what another model, another
            table or other settings have left there is not looked at.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text.
        options: how the models are loaded and read texts.
        calibration: applied to the mean margin.
        cluster: whose workers share the pairs; None: this process, or those of the launcher.
    """
    kept = from_main_process(lambda: folder / _key(models, pairs, max_length, options))
    texts = pairs.select_columns(list(TEXT))
    made, alike = [], np.zeros(len(pairs), dtype=bool)
    for number, model in enumerate(models):
        job = ScoreJob(str(model), batch_tokens, max_length, options)
        own = kept / str(number)
        found = map_shards(texts, job, own, size=SHARD, what="scoring", cluster=cluster, together=True).whole()
        alike |= np.asarray(found[ALIKE])
        made.append(with_rewards(pairs, *(np.asarray(found[name]) for name in ("reward_chosen", "reward_rejected"))))
    all_gather_objects([process_rank()])  # nobody reads a shard any more
    if process_rank() == 0:
        shutil.rmtree(folder)
        tell_alike(alike)
    table = _averaged(pairs, made)
    return table if calibration is None else calibration.apply(table)


def _key(models: Sequence[Path | str], pairs: Dataset, max_length: int, options: LoadOptions = DEFAULTS) -> str:
    """Of what the rewards depend on."""
    made_from = [*(fingerprint_model(str(model)) for model in models), fingerprint(pairs), max_length, REWARDS]
    made_from.append(options.suffix)
    return digest(made_from)[:KEY_DIGITS]


def _averaged(pairs: Dataset, scored: Sequence[Dataset]) -> Dataset:
    """``pairs`` with the means of the members' score columns, and the standard deviation of their margins."""
    rewards = np.stack([np.stack([np.asarray(one[column]) for column in SCORES], axis=1) for one in scored])
    columns = dict(zip(SCORES, rewards.mean(axis=0).T, strict=True))
    if len(scored) > 1:
        columns[SPREAD] = rewards[:, :, -1].std(axis=0, ddof=1)
    stale = [SPREAD] if SPREAD in pairs.column_names else []
    return with_columns(pairs.remove_columns(stale), columns)
