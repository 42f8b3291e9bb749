"""Cross-fitted margins: every pair scored by a model that has not seen it."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from align.config import RewardConfig
from align.console import log
from align.pairs import folds_by_prompt
from reward_models.score import COLUMNS, RewardScorer
from reward_models.train import train_reward_model


def cross_fit(pairs: Dataset, config: RewardConfig, folder: Path, *, seed: int) -> Dataset:
    """Train ``config.folds`` models, each on all folds but its own; score each fold by its model.

    A model's margins on its own training pairs are overconfident; out-of-fold margins are not.

    Args:
        pairs: pair table.
        config: reward model and number of folds k >= 2.
        folder: gets fold-0 ... fold-(k-1), model folders; one that is there is not trained again.
        seed: seed of the folds and the models.

    Returns:
        The table with reward_chosen, reward_rejected, margin and ``fold``.
    """
    fold = folds_by_prompt(pairs, config.folds, seed)
    scores = np.zeros((len(pairs), len(COLUMNS)))
    for k in range(config.folds):
        inside = np.flatnonzero(fold == k)
        log.info("cross-fitting: fold %d of %d, %d pairs to score", k + 1, config.folds, len(inside))
        model = folder / f"fold-{k}"
        train_reward_model(pairs.select(np.flatnonzero(fold != k)), config, model, seed=seed + 1 + k)
        scorer = RewardScorer(
            model,
            batch_tokens=config.batch_tokens,
            max_length=config.max_length,
            trust_remote_code=config.trusts_remote_code,
        )
        scored = scorer.score_pairs(pairs.select(inside))
        scores[inside] = np.stack([np.asarray(scored[column]) for column in COLUMNS], axis=1)
    table = pairs.remove_columns([column for column in COLUMNS if column in pairs.column_names])
    for column, values in zip(COLUMNS, scores.T, strict=True):
        table = table.add_column(column, values.tolist())
    return table.add_column("fold", fold.tolist())
