"""The score columns of a pair table, each cached under a key of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import ClusterSection, FilterSection, OodSection
from align.config.columns import TEXT as PARTS
from align.data.text import cells, column, texts
from align.filtering.embeddings import PART, Encoder, TextEncoder, read_embeddings
from align.filtering.ood import Mahalanobis
from align.filtering.quality import make_scorer, pair_quality
from align.filtering.scores import over_spread
from align.filtering.selection import robust_scale
from align.filtering.static_embeddings import StaticEncoder
from align.filtering.text_survey import Survey
from align.io.array_cache import cached_arrays
from align.io.hashing import digest, fingerprint_source
from align.models.folders import fingerprint_model
from align.sharding.arrays import as_table, map_arrays
from align.sharding.jobs import Work
from reward_models.loading import LoadOptions
from reward_models.score import REWARDS

ROWS = 1024
"""Pairs of a shard that a model reads."""


def margins(pairs: Dataset, *, in_spreads: bool) -> np.ndarray | None:
    """Margin [N], with ``in_spreads`` divided by its ensemble spread; None if the pairs have no margins."""
    if "margin" not in pairs.column_names:
        return None
    margin = _numbers(pairs, "margin")
    return over_spread(margin, _numbers(pairs, "margin_std")) if in_spreads else margin


def prompt_embeddings(
    pairs: Dataset, settings: FilterSection, cache: Path, cluster: ClusterSection | None = None
) -> tuple[np.ndarray, str]:
    """Unit vectors [N, D] of the prompts, memory-mapped, and their cache key: the user's vectors, or a model's."""
    if settings.embeddings is not None:
        return read_embeddings(settings.embeddings, len(pairs)), fingerprint_source(settings.embeddings)
    model = settings.embedding_model
    key = digest([fingerprint_source(model), settings.embedding])[:16]
    static = settings.embedding == "static"
    job = Embedding(model, cache / f"tokens-{key}.safetensors" if static else None)
    columns = map_arrays(
        pairs.select_columns(["prompt"]), job, cache / f"embedding-{key}", what="embedding", rows=PART,
        cluster=None if static else cluster,
    )  # fmt: skip
    return columns["vector"], key


def qualities(
    pairs: Dataset, survey: Survey, settings: FilterSection, cache: Path, cluster: ClusterSection | None = None
) -> dict[str, np.ndarray]:
    """``quality`` [N]; with several scorers their mean after robust scaling, and each score as ``quality_<name>``."""
    scores: dict[str, np.ndarray] = {}
    for name in settings.quality_scorers:
        if name == "screen":
            scores[name] = survey.screen
            continue
        key = digest([name, fingerprint_model(str(settings.quality_model)), REWARDS])[:16]
        job, folder = Quality(name, settings.quality_model), cache / f"quality-{key}"
        table = pairs.select_columns(list(PARTS))
        columns = map_arrays(table, job, folder, what=f"quality: {name}", rows=ROWS, cluster=cluster)
        scores[name] = np.asarray(columns["quality"])
    if len(scores) == 1:
        return {"quality": next(iter(scores.values()))}
    mean = np.mean([robust_scale(values) for values in scores.values()], axis=0)
    return {"quality": mean} | {f"quality_{name}": values for name, values in scores.items()}


def distances(
    pairs: Dataset, ood: OodSection, cache: Path, cluster: ClusterSection | None = None
) -> tuple[np.ndarray, float]:
    """Mahalanobis distance [N] of each pair to the reward model's training pairs, and its quantile on held-back pairs.

    The distance of a pair is the larger of its two responses'. Half of the training pairs fit means and covariance; the
    other half is held back for the quantile.

    Raises:
        AlignError: the model or its pairs cannot be used.
    """
    from align.data.pairs import fingerprint, load_pairs

    known = load_pairs(ood.pairs)
    options = LoadOptions(ood.dtype, ood.trust_remote_code, ood.text_pair)
    key = digest([fingerprint_model(ood.model) + options.suffix, fingerprint(known), ood.quantile, REWARDS])[:16]
    file = cache / f"ood-{key}.safetensors"
    fitted = cached_arrays(file, lambda: _fit(known, ood, options))
    job = Distance(ood.model, options, Mahalanobis(fitted["means"], fitted["whitening"]))
    table = pairs.select_columns(list(PARTS))
    columns = map_arrays(table, job, cache / f"ood-{key}", what="distances", rows=ROWS, cluster=cluster)
    return np.asarray(columns["ood"]), float(fitted["limit"][0])


@dataclass(frozen=True, slots=True)
class Embedding:
    """Job that embeds prompts as unit vectors."""

    model: str
    tokens: Path | None
    """Table of a ``StaticEncoder``; None: the encoder itself."""

    def start(self) -> Work:
        """Load the encoder.

        Raises:
            ModelError: it cannot be loaded.
        """
        encoder: TextEncoder = Encoder(self.model) if self.tokens is None else StaticEncoder(self.model, self.tokens)

        def work(rows: Dataset) -> Dataset:
            return as_table({"vector": encoder(column(rows.with_format("arrow")[:]["prompt"]).to_pylist())})

        return work


@dataclass(frozen=True, slots=True)
class Quality:
    """Job that scores the quality of pairs with one scorer."""

    name: str
    model: str | None

    def start(self) -> Work:
        """Load the scorer.

        Raises:
            AlignError: it cannot be loaded.
        """
        scorer = make_scorer(self.name, self.model)

        def work(rows: Dataset) -> Dataset:
            strings = texts(rows)
            return as_table({"quality": pair_quality(scorer, *(strings[k::3].to_pylist() for k in range(3)))})

        return work


@dataclass(frozen=True, slots=True)
class Distance:
    """Job that computes the Mahalanobis distances of pairs."""

    model: str
    options: LoadOptions
    fitted: Mahalanobis

    def start(self) -> Work:
        """Load the reward model.

        Raises:
            ModelError: it cannot be loaded.
        """
        features = _features(self.model, self.options)
        return lambda rows: as_table({"ood": _pair_distance(self.fitted, features(rows))})


def _fit(known: Dataset, ood: OodSection, options: LoadOptions) -> dict[str, np.ndarray]:
    """Means and whitening matrix of one half of the training pairs, and the quantile of the other's distances."""
    half = np.random.default_rng(0).permutation(len(known)) < len(known) // 2
    features = _features(ood.model, options)
    first, second = features(known.select(np.flatnonzero(half))), features(known.select(np.flatnonzero(~half)))
    model = Mahalanobis.fit(first, np.tile([0, 1], len(first) // 2))
    limit = np.quantile(_pair_distance(model, second), ood.quantile)
    return {"means": model.means, "whitening": np.ascontiguousarray(model.whitening), "limit": np.array([limit])}


def _features(model: str, options: LoadOptions) -> Callable[[Dataset], np.ndarray]:
    """Inputs of the reward model's head, chosen and rejected alternating, [2 N, D].

    An ensemble is represented by its first member, since the feature spaces of two members are unrelated.
    """
    from align.models.chat_template import template_settings
    from align.models.pair_rows import pair_name
    from reward_models.features import head_features
    from reward_models.score import RewardScorer

    scorer = RewardScorer(model, batch_tokens=4096, max_length=1024, options=options)

    def features(pairs: Dataset) -> np.ndarray:
        def rendered(row: Any) -> list[str]:
            name, settings = pair_name(row), template_settings(row)
            return [
                scorer.text(row["prompt"], row[side], row=name, settings=settings) for side in ("chosen", "rejected")
            ]

        return head_features(scorer, [text for row in pairs for text in rendered(row)])

    return features


def _pair_distance(model: Mahalanobis, features: np.ndarray) -> np.ndarray:
    """The larger distance of each pair's two responses, [N], from alternating features [2 N, D]."""
    return np.sqrt(model.squared(features).reshape(-1, 2).max(axis=1))


def _numbers(pairs: Dataset, name: str) -> np.ndarray:
    values: np.ndarray = cells(pairs, name).to_numpy().astype(np.float64, copy=False)
    return values
