"""Ensembles of reward models: ``margin`` is the mean of the members, ``margin_std`` their standard deviation.

The first member is the model folder itself, which also loads as a single reward model; the others are in its subfolder
``members/``.
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
from align.data.splits import draw_clusters
from align.data.training_pairs import margin_sources, with_source
from align.distributed import all_gather_objects, from_main_process, process_rank
from align.io.hashing import digest
from align.models.folders import fingerprint_model
from align.sharding.shards import map_shards
from align.training.base.trackers import TrackedRun
from reward_models.calibration import MarginMap
from reward_models.features import FeatureScoreJob
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.score import ALIKE, REWARDS, RewardScorer, ScoreJob, tell_alike, with_rewards
from reward_models.tokenization import warn_of_unread
from reward_models.train import train_reward_model

MEMBERS = "members"
SEED_STEP = 7919
SHARD = 512
"""Pairs per shard, the unit of work of a process; a stopped scoring loses unfinished shards only."""
KEY_DIGITS = 8


def train_members(
    train: Dataset,
    config: RewardSection,
    output: Path,
    *,
    seed: int,
    run: TrackedRun | None = None,
    features: Path | None = None,
) -> None:
    """Train ``config.ensemble`` reward models into ``output`` and ``output/members``; existing ones are kept.

    Members differ in the seed of their head and of the order of the pairs. A linear head on frozen features has no
    seed; there each member but the first is trained on a bootstrap sample of the pairs, drawn by cluster (bagging).

    Args:
        train: pair table.
        config: reward model.
        output: folder of the first model.
        seed: seed of the first member.
        run: names under which the trackers of ``report_to`` show the trainings; each other member has its own.
        features: folder of the features of frozen backbones, see ``train_reward_model``.
    """
    train_reward_model(train, config, output, seed=seed, run=run, features=features)
    for number in range(1, config.ensemble):
        own = seed + SEED_STEP * number
        pairs = train
        if config.head != "full":
            pairs = train.select(draw_clusters(train, own))
        (output / MEMBERS).mkdir(exist_ok=True)
        part = None if run is None else run.part(f"member-{number}")
        train_reward_model(pairs, config, output / MEMBERS / str(number), seed=own, run=part, features=features)


def members(model: Path | str) -> list[Path | str]:
    """The model and the other members of its ensemble, in order; for a hub id only the id."""
    below = Path(model) / MEMBERS
    found = [folder for folder in below.iterdir() if folder.name.isdigit()] if below.is_dir() else []
    return [model, *sorted(found, key=lambda folder: int(folder.name))]


class EnsembleScorer:
    """Scores completions by the mean reward of the members of an ensemble, or by the reward of a single model.

    All members stay in memory, so that each is loaded once for any number of calls.

    Args:
        model: folder or hub id.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text; longer ones are cut from the right.
        options: how the members are loaded and read texts.
        device: where they compute; None: see ``local_device``.

    Raises:
        ModelError: a member cannot be used.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        batch_tokens: int,
        max_length: int,
        options: LoadOptions = DEFAULTS,
        device: str | None = None,
    ) -> None:
        self.scorers = [
            RewardScorer(member, batch_tokens=batch_tokens, max_length=max_length, options=options, device=device)
            for member in members(model)
        ]

    def score_completions(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Mean reward of each completion after its prompt, float64 [N]; warns if prompts fill ``max_length``.

        Raises:
            ModelError: the texts are messages, and the model's tokenizer has no chat template.
        """
        first = self.scorers[0]
        warn_of_unread(prompts, completions, first.tokenizer, first.max_length, text_pair=first.text_pair)
        rewards = [scorer.score_completions(prompts, completions) for scorer in self.scorers]
        return np.asarray(np.mean(rewards, axis=0))

    def score_pairs(self, pairs: Dataset, *, shard: int | None = None) -> Dataset:
        """The table with the mean rewards and their margin, and ``margin_std`` for at least two members.

        Args:
            pairs: pair table.
            shard: pairs to batch together, at ``SHARD`` as in ``score_with``, to the bit; None: all.
        """
        count, alike, scored = len(pairs), np.zeros(len(pairs), dtype=bool), []
        size = shard or max(count, 1)
        for scorer in self.scorers:
            parts = [
                scorer.score_and_tell(pairs.select(range(start, min(start + size, count))))
                for start in range(0, max(count, 1), size)
            ]
            alike |= np.concatenate([part for _, part in parts])
            rewards = ([np.asarray(part[name]) for part, _ in parts] for name in SCORES[:2])
            scored.append(with_rewards(pairs, *(np.concatenate(values) for values in rewards)))
        tell_alike(alike)
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
    features: Path | None = None,
) -> Dataset:
    """The table with the mean rewards of the models, their margin, its ``margin_source``, and ``margin_std`` for at
    least two models.

    Each model in turn is loaded and scores all pairs, so that only one is in memory. All processes of a launcher call
    this together and share the work. Logs how many pairs have responses that are equal after truncation.

    Args:
        models: at least one.
        pairs: pair table.
        folder: keeps finished shards, so that a stopped scoring resumes; shards of another model, table or setting are
            ignored, and the folder is removed at the end.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text.
        options: how the models are loaded and read texts.
        calibration: map applied to the mean margin.
        cluster: Ray cluster that scores; None: this process, or all processes of the launcher.
        features: folder of the features of frozen backbones, if the heads are linear: a text that it has is not read
            again. Without effect on a cluster.
    """
    kept = from_main_process(lambda: folder / _key(models, pairs, max_length, options))
    texts = pairs.select_columns(list(TEXT))
    made, alike = [], np.zeros(len(pairs), dtype=bool)
    for number, model in enumerate(models):
        job = ScoreJob(str(model), batch_tokens, max_length, options)
        if features is not None and cluster is None:
            job = FeatureScoreJob(str(model), batch_tokens, max_length, options, features)
        own = kept / str(number)
        found = map_shards(texts, job, own, size=SHARD, what="scoring", cluster=cluster, together=True).whole()
        alike |= np.asarray(found[ALIKE])
        made.append(with_rewards(pairs, *(np.asarray(found[name]) for name in ("reward_chosen", "reward_rejected"))))
    all_gather_objects([process_rank()])  # barrier: all ranks have read the shards
    if process_rank() == 0:
        shutil.rmtree(folder)
        tell_alike(alike)
    table = with_source(_averaged(pairs, made), margin_sources(models, pairs))
    return table if calibration is None else calibration.apply(table)


def _key(models: Sequence[Path | str], pairs: Dataset, max_length: int, options: LoadOptions = DEFAULTS) -> str:
    """Cache key: content of the models and the pairs, max_length, revision of the scoring."""
    made_from = [*(fingerprint_model(str(model)) for model in models), fingerprint(pairs), max_length, REWARDS]
    made_from.append(options.suffix)
    return digest(made_from)[:KEY_DIGITS]


def _averaged(pairs: Dataset, scored: Sequence[Dataset]) -> Dataset:
    """``pairs`` with the means of the score columns over the members, and the standard deviation of the margins."""
    rewards = np.stack([np.stack([np.asarray(one[column]) for column in SCORES], axis=1) for one in scored])
    columns = dict(zip(SCORES, rewards.mean(axis=0).T, strict=True))
    if len(scored) > 1:
        columns[SPREAD] = rewards[:, :, -1].std(axis=0, ddof=1)
    stale = [SPREAD] if SPREAD in pairs.column_names else []
    return with_columns(pairs.remove_columns(stale), columns)
