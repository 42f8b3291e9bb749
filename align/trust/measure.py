"""Measure how far to trust labels and margins: linear stand-ins for the policy, evaluated on held-out labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.data.splits import clusters_of, folds_of_clusters
from align.data.text import count_words
from align.data.training_pairs import SOURCE, SOURCES, UNKNOWN, report_in_sample, source_of
from align.data.votes import refuse_without_majority
from align.errors import DataError
from align.io.console import log
from align.io.files import read_json
from align.models.turns import Turns
from align.stats import FEWEST_UNITS
from align.trust.analysis import analyze
from align.trust.linear_proxy import Family
from align.trust.sentences import sentences
from align.trust.shared_errors import shared_error_signs

FEWEST = 50
MOST = 50_000
"""Pairs to measure on, at most: the held-out log-likelihoods of all settings and their bootstrap stay in memory."""
FOLDS, REPEATS = 5, 3


def measure_trust(
    pairs: Dataset,
    model: str,
    cache: Path,
    *,
    origin: str,
    max_length: int | None,
    seed: int,
    truncation: str = "keep_start",
    turns: Turns = "assistant",
    loading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run ``analyze`` on a pair table; add signs of shared errors and the seconds of each part.

    Args:
        pairs: pair table that passed ``check_margins``.
        model: reference, hub id or folder.
        cache: folder that keeps the features.
        origin: where the margins come from, one of ``SOURCES``.
        max_length: tokens of prompt and response together; None: all.
        seed: seed of the folds and the bootstrap.
        truncation: ``keep_start`` or ``keep_end``, as in trl.DPOConfig.
        turns: whose words count in responses of several messages.
        loading: arguments of ``from_pretrained``, see ``pair_features``.

    Raises:
        AlignError: the model cannot be used, or truncation leaves nothing of a response.
    """
    import time

    from align.trust.features import pair_features, uncentered_pca

    start = time.monotonic()
    pairs, clusters = _measured(pairs, seed)
    differences = pair_features(
        pairs, model, cache, max_length=max_length, truncation=truncation, turns=turns, loading=loading
    )
    done = time.monotonic()
    log.info("trust: %d pairs, features computed in %.0f s, now fitting the proxy", len(pairs), done - start)
    margin = np.asarray(pairs["margin"], dtype=np.float64)
    folds = [folds_of_clusters(clusters, FOLDS, seed + repeat) for repeat in range(REPEATS)]
    same_labels = origin in ("cross-fitted", "in-sample")
    found = analyze(
        uncentered_pca(differences), margin, folds, Family(), same_labels=same_labels, seed=seed, clusters=clusters
    )
    lengths = np.array([count_words(row["chosen"]) - count_words(row["rejected"]) for row in pairs], dtype=np.float64)
    groups = [str(group) for group in pairs["group"]] if "group" in pairs.column_names else None
    found["signs"] = shared_error_signs(margin, lengths, groups, clusters)
    found["seconds"] = {"features": done - start, "proxy": time.monotonic() - done}
    return found


def assess_trust(
    pairs: Dataset,
    model: str,
    cache: Path,
    *,
    where: str,
    origin: str,
    allow_in_sample: bool,
    max_length: int,
    seed: int,
) -> dict[str, Any]:
    """Check the margins, measure, and say in sentences what follows: the content of ``trust.json``.

    Args:
        pairs: pair table.
        model: reference, hub id or folder.
        cache: folder that keeps the features.
        where: name of the table, for messages.
        origin: where the margins come from, one of ``SOURCES`` or ``UNKNOWN``.
        allow_in_sample: accept in-sample margins.
        max_length: tokens of prompt and response together.
        seed: seed of the folds and the bootstrap.

    Raises:
        AlignError: the pairs, their margins or the model cannot be used.
    """
    check_known(origin, where)
    report_in_sample(pairs, "trust")
    check_margins(pairs, origin, where, allow_in_sample=allow_in_sample)
    found = measure_trust(pairs, model, cache, origin=origin, max_length=max_length, seed=seed)
    found |= {"source": where, "model": model, "margins": origin, "seed": seed}
    found["sentences"] = sentences(found, origin)
    return found


def _measured(pairs: Dataset, seed: int) -> tuple[Dataset, np.ndarray]:
    """The pairs to measure, complete clusters of at most ``MOST`` pairs drawn at random, and the cluster of each.

    Raises:
        DataError: too few clusters for intervals.
    """
    clusters = clusters_of(pairs)
    count = int(clusters.max()) + 1
    if count < FEWEST_UNITS:
        raise DataError(
            f"found {len(pairs)} pairs in {count} groups that share prompts or responses, expected at least "
            f"{FEWEST_UNITS} groups: fewer cannot tell settings apart",
            code="trust-too-few",
            hint="train with plain DPO, or collect pairs of more prompts",
        )
    if len(pairs) <= MOST:
        return pairs, clusters
    order = np.random.default_rng(seed).permutation(count)
    sizes = np.bincount(clusters)[order]
    kept = np.flatnonzero(np.isin(clusters, order[np.cumsum(sizes) <= MOST]))
    log.info("trust: measured on %d of %d pairs, drawn at random", len(kept), len(pairs))
    return pairs.select(kept), np.unique(clusters[kept], return_inverse=True)[1]


def loss_parameters(found: dict[str, Any]) -> dict[str, float]:
    """Parameters of the loss ``trust`` from the result of ``measure_trust``."""
    return {"slope": found["slope"], "trust": found["chosen"]["trust"], "strength": found["chosen"]["strength"]}


def margin_source(table: Path, pairs: Dataset | None = None) -> str:
    """The origin of the margins according to the column ``margin_source`` of the pairs, else to the run that wrote
    ``table``; ``unknown`` without such a record."""
    if pairs is not None and SOURCE in pairs.column_names:
        return source_of(pairs)
    for folder in (table, table.parent):
        file = folder.parent / "metrics.json"
        metrics = read_json(file) if file.exists() else None
        for found in (metrics, metrics.get(folder.name)) if isinstance(metrics, dict) else ():
            if isinstance(found, dict) and found.get("margins") in SOURCES:
                return str(found["margins"])
    return UNKNOWN


def check_known(origin: str, where: str) -> None:
    """Check that the origin of the margins is known.

    Raises:
        DataError: it is not.
    """
    if origin == UNKNOWN:
        raise DataError(
            f"{where}: found margins of unknown origin, expected to know whether their reward model was trained on "
            "these pairs: margins of a model that has seen the labels repeat them",
            code="trust-origin",
            hint="give --margins outside (other labels), cross-fitted or in-sample",
        )


def check_margins(pairs: Dataset, origin: str, where: str, *, allow_in_sample: bool) -> None:
    """Check that the margins of a table can be compared with its labels.

    Raises:
        DataError: there are too few pairs, or margins are missing, all equal, all of one sign, or in-sample.
    """
    if "margin" not in pairs.column_names:
        raise DataError(
            f"{where}: the pairs have no `margin` column",
            code="trust-margins",
            hint="run `align reward score` first, or name the column with --column margin=...",
        )
    values = pairs["margin"]
    missing = [str(name) for name, value in zip(pairs["id"], values, strict=True) if value is None]
    if missing:
        raise DataError(
            f"{where}: found {len(missing)} of {len(values)} pairs without a margin (first: {missing[0]}), expected "
            "one for each",
            code="trust-margins",
            hint="score them with `align reward score`, or leave them out",
        )
    refuse_without_majority(pairs, "trust compares margins with labels", "pairs with a majority alone")
    if len(values) < FEWEST:
        raise DataError(
            f"{where}: found {len(values)} pairs, expected at least {FEWEST}: fewer labels cannot tell settings apart",
            code="trust-too-few",
            hint="train with plain DPO or MADPO, or collect more pairs",
        )
    margin = np.asarray(values, dtype=np.float64)
    if np.ptp(margin) == 0:
        raise DataError(
            f"{where}: found the same margin ({margin[0]:g}) for every pair, expected margins that differ",
            code="trust-margins",
            hint="check the reward model: a constant carries no information",
        )
    if (margin >= 0).all() or (margin <= 0).all():
        agree = "agrees with" if (margin >= 0).all() else "contradicts"
        raise DataError(
            f"{where}: found that the margin {agree} the label of every pair, expected some of each: such labels "
            "were made from the margins, or the margins from the labels, and cannot be compared",
            code="trust-margins",
            hint="use margins of a reward model that has not seen these labels",
        )
    if "in-sample" in (origin, source_of(pairs)) and not allow_in_sample:
        raise DataError(
            f"{where}: found in-sample margins{_how_many(pairs)} (by a reward model that has seen the label), expected "
            "cross-fitted or outside ones: such margins repeat the labels and would be trusted too much",
            code="trust-in-sample",
            hint="set reward.folds: 5, or force it with --allow-in-sample",
        )


def _how_many(pairs: Dataset) -> str:
    count = list(pairs[SOURCE]).count("in-sample") if SOURCE in pairs.column_names else 0
    return f" in {count} of {len(pairs)} pairs" if count else ""
