"""Stages of the reward model: train it (or an ensemble), calibrate its margins, cross-fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import RewardSection, RunConfig
from align.data.pairs import FILE, read_pairs, write_pairs
from align.data.splits import clusters_of, folds_by_prompt
from align.data.thumbs import without_thumbs
from align.data.training_pairs import source_of
from align.data.votes import with_majority
from align.distributed import local_device, process_rank
from align.io.allocator import keep_freed_memory
from align.io.console import log
from align.io.files import write_json
from align.training.base.tracked_runs import tracked_run
from align.training.train import MODEL
from reward_models.calibration import MarginMap, calibrated_out_of_fold, fit_map
from reward_models.crossfit import FOLD, cross_fit
from reward_models.ensemble import EnsembleScorer, members, score_with, train_members
from reward_models.features import features_folder, remove_features
from reward_models.length_bias import length_probe, word_difference
from reward_models.loading import load_options
from reward_models.margin_metrics import evaluate_margins

METRICS = "metrics.json"
FOLDS = 5
"""Folds of the held-out pairs, which measure a calibration on pairs that it was not fitted on."""


def stage_reward(config: RunConfig, folder: Path) -> None:
    """Train the reward model; write its held-out and in-sample metrics and margins."""
    assert config.reward is not None
    source = reward_pairs_folder(config.reward, config.folder)
    train, heldout = read_pairs(source / "train"), read_pairs(source / "heldout")
    if local_device() == "cpu":
        keep_freed_memory()
    model, features = folder / MODEL, features_folder(config.reward, folder)
    run = tracked_run(config.folder, config.name, "reward")
    train_members(train, config.reward, model, seed=config.seed, run=run, features=features)
    metrics: dict[str, Any] = {"backbone": config.reward.model, "ensemble": config.reward.ensemble}
    tables = {
        name: scored_by(members(model), pairs, config, folder, features=features)
        for name, pairs in (("heldout", heldout), ("in_sample", without_thumbs(train)))
        if len(pairs)
    }
    remove_features(features)
    if process_rank() > 0:
        return
    for name, table in tables.items():
        write_pairs(table, folder / name)
        scored = with_majority(table, f"metrics of the reward model, {name}")
        margins = np.asarray(scored["margin"])
        clusters = clusters_of(scored)
        metrics[name] = {"margins": source_of(scored), **evaluate_margins(margins, clusters=clusters).to_dict()}
        if name == "heldout":
            words = word_difference(scored)
            metrics["length"] = length_probe(margins, words, clusters=clusters)
            fold = folds_by_prompt(scored, FOLDS, config.seed)
            metrics |= _fit_calibration(margins, words, fold, clusters, config.reward, model)
    write_json(folder / METRICS, metrics)


def _fit_calibration(
    margins: np.ndarray,
    words: np.ndarray,
    fold: np.ndarray,
    clusters: np.ndarray,
    reward: RewardSection,
    model: Path,
) -> dict[str, Any]:
    """Write the calibration of the margins into the model folder; return its metrics on pairs it was not fitted on."""
    if reward.calibrate is None and not reward.length_residual:
        return {}
    fitted = fit_map(margins, words, reward.calibrate, length=reward.length_residual)
    fitted.save(model)
    mapped = calibrated_out_of_fold(margins, words, fold, reward.calibrate, length=reward.length_residual)
    shown = {"kind": fitted.kind, "temperature": fitted.temperature, "length_slope": fitted.length_slope}
    return {"calibration": shown, "heldout_calibrated": evaluate_margins(mapped, clusters=clusters).to_dict()}


def stage_crossfit(config: RunConfig, folder: Path) -> None:
    """Score the reward model's own training pairs, each by a model that was not trained on it."""
    assert config.reward is not None
    train = read_pairs(reward_pairs_folder(config.reward, config.folder) / "train")
    run = tracked_run(config.folder, config.name, "reward")
    scored = cross_fit(train, config.reward, folder, seed=config.seed, cluster=config.cluster, run=run)
    if process_rank() > 0:
        return
    write_pairs(scored.remove_columns(FOLD), folder / "pairs")
    judged = with_majority(scored, "metrics of the cross-fitted margins")
    found = evaluate_margins(np.asarray(judged["margin"]), clusters=clusters_of(judged), cross_fitted=True)
    write_json(folder / METRICS, {"margins": source_of(scored), **found.to_dict()})
    finished = config.folder / "crossfit" / "pairs" / FILE  # `folder` is renamed to it when the stage has ended
    log.info("cross-fitted margins: %s; train, filter and `align trust` with this table", finished)


def scored_by(
    models: Sequence[Path | str],
    pairs: Dataset,
    config: RunConfig,
    folder: Path,
    calibration: MarginMap | None = None,
    features: Path | None = None,
) -> Dataset:
    """Score pairs by the mean of the models, with the batch size and length of the run's reward section.

    Under a launcher all processes call this together. A stopped call leaves its finished shards in ``folder/scored``.
    """
    assert config.reward is not None
    return score_with(
        models,
        pairs,
        folder / "scored",
        batch_tokens=config.reward.batch_tokens,
        max_length=config.reward.max_length,
        options=load_options(config.reward),
        calibration=calibration,
        cluster=config.cluster,
        features=features,
    )


def reward_pairs_folder(config: RewardSection, root: Path) -> Path:
    """Folder of the stage that wrote the reward model's training pairs."""
    return root / ("pairs" if config.pairs is None else "pairs-reward")


def make_scorer(model: Path, config: RewardSection) -> EnsembleScorer:
    """A scorer of the model, or of all members of an ensemble, with the batch size and length of its section."""
    return EnsembleScorer(
        model,
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
        options=load_options(config),
    )
