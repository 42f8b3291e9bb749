"""Cross-fitted margins: each pair is scored by a model that was not trained on it."""

from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from align.config import ClusterSection, RewardSection
from align.config.columns import SCORES, SPREAD
from align.data.pairs import with_columns
from align.data.splits import folds_by_prompt
from align.data.training_pairs import cross_fitted_sources, with_source
from align.data.votes import with_majority
from align.io.console import log
from align.training.base.trackers import TrackedRun
from reward_models.calibration import fit_map
from reward_models.ensemble import members, score_with, train_members
from reward_models.features import features_folder, remove_features
from reward_models.length_bias import word_difference
from reward_models.loading import load_options

FOLD = "crossfit_fold"
"""Column of the number of the fold that a pair is in; its model was not trained on the pair."""


def cross_fit(
    pairs: Dataset,
    config: RewardSection,
    folder: Path,
    *,
    seed: int,
    cluster: ClusterSection | None = None,
    run: TrackedRun | None = None,
) -> Dataset:
    """Train ``config.folds`` models, each on all folds but one, and score the left-out fold with it.

    All processes of a launcher call this together. The margins of a model on its own training pairs are overconfident;
    out-of-fold margins are not.

    Args:
        pairs: pair table.
        config: reward model and number of folds k >= 2.
        folder: for the model folders fold-0 ... fold-(k-1); a model that exists is not trained again.
        seed: seed of the folds and the models.
        cluster: Ray cluster that scores.
        run: names under which the trackers of ``report_to`` show the trainings; each fold has its own.

    Returns:
        The table with reward_chosen, reward_rejected, margin, ``margin_std`` for an ensemble,
        ``margin_source`` and ``FOLD``.
    """
    fold = folds_by_prompt(pairs, config.folds, seed)
    columns = SCORES if config.ensemble == 1 else (*SCORES, SPREAD)
    features = features_folder(config, folder)
    scores = np.zeros((len(pairs), len(columns)))
    for k in range(config.folds):
        inside = np.flatnonzero(fold == k)
        log.info("cross-fitting: fold %d of %d, %d pairs to score", k + 1, config.folds, len(inside))
        model = folder / f"fold-{k}"
        part = None if run is None else run.part(f"fold-{k}")
        others = pairs.select(np.flatnonzero(fold != k))
        train_members(others, config, model, seed=seed + 1 + k, run=part, features=features)
        scored = score_with(
            members(model),
            pairs.select(inside),
            folder / "scored",
            batch_tokens=config.batch_tokens,
            max_length=config.max_length,
            options=load_options(config),
            cluster=cluster,
            features=features,
        )
        scores[inside] = np.stack([np.asarray(scored[column]) for column in columns], axis=1)
    remove_features(features)
    table = pairs.remove_columns([column for column in columns if column in pairs.column_names])
    for column, values in zip(columns, scores.T, strict=True):
        table = table.add_column(column, values.tolist())
    table = with_source(table, cross_fitted_sources(config.model, pairs))
    return with_columns(_calibrated(table, fold, config), {FOLD: fold})


def _calibrated(table: Dataset, fold: np.ndarray, config: RewardSection) -> Dataset:
    """Calibrate each fold by a map that was fitted on the other folds, if the configuration asks for it."""
    if config.calibrate is None and not config.length_residual:
        return table
    parts = []
    for number in range(config.folds):
        others = with_majority(table.select(np.flatnonzero(fold != number)), f"calibration of fold {number + 1}")
        margins, words = np.asarray(others["margin"]), word_difference(others)
        fitted = fit_map(margins, words, config.calibrate, length=config.length_residual)
        parts.append(fitted.apply(table.select(np.flatnonzero(fold == number))))
    order = np.argsort(np.concatenate([np.flatnonzero(fold == number) for number in range(config.folds)]))
    return concatenate_datasets(parts).select(order)
