"""The score columns of a pair table, each kept in the cache under the key of what determines it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset

from align.config import FilterConfig, OodConfig
from align.filtering.embed import Encoder, TextEncoder, read_embeddings, stored_embedding
from align.filtering.ood import Mahalanobis
from align.filtering.parts import Arrays, gathered, in_parts
from align.filtering.quality import QualityScorer, make_scorer, pair_quality
from align.filtering.scores import over_spread
from align.filtering.select import standardise
from align.filtering.static import StaticEncoder
from align.filtering.survey import Survey
from align.filtering.texts import cells, column, texts
from align.stage import digest, fingerprint_source

ROWS = 1024
"""Pairs of a part where a model reads the texts."""


def margins(pairs: Dataset, *, in_spreads: bool) -> np.ndarray | None:
    """Margin [N], divided by its ensemble spread where asked for, or None where the pairs have none."""
    if "margin" not in pairs.column_names:
        return None
    margin = _numbers(pairs, "margin")
    return over_spread(margin, _numbers(pairs, "margin_std")) if in_spreads else margin


def vectors(pairs: Dataset, settings: FilterConfig, cache: Path) -> np.ndarray:
    """Unit vectors [N, D] of the prompts, memory-mapped: the user's, or of the embedding model."""
    if settings.embeddings is not None:
        return read_embeddings(settings.embeddings, len(pairs))
    model = settings.embedding_model
    key = digest([fingerprint_source(model), settings.embedding])[:16]

    def prompts(start: int, stop: int) -> list[str]:
        found: list[str] = column(pairs.with_format("arrow")[start:stop]["prompt"]).to_pylist()
        return found

    def encoder() -> TextEncoder:
        is_static = settings.embedding == "static"
        return StaticEncoder(model, cache / f"tokens-{key}.safetensors") if is_static else Encoder(model)

    return stored_embedding(prompts, len(pairs), encoder, cache / f"embedding-{key}.npy")


def qualities(pairs: Dataset, survey: Survey, settings: FilterConfig, cache: Path) -> dict[str, np.ndarray]:
    """``quality`` [N], and where there is more than one scorer each of theirs as ``quality_<name>``."""
    found: dict[str, np.ndarray] = {}
    for name in settings.quality_scorers:
        if name == "screen":
            found[name] = survey.screen.astype(np.float64)
            continue
        key = digest([name, fingerprint_source(str(settings.quality_model))])[:16]
        scorer = _Once(name, settings.quality_model)
        folder = cache / f"quality-{key}"
        in_parts(partial(_quality, pairs, scorer), len(pairs), folder, what=f"quality: {name}", rows=ROWS)
        found[name] = gathered(folder, len(pairs), ("quality",), ROWS)["quality"]
    if len(found) == 1:
        return {"quality": next(iter(found.values()))}
    mean = np.mean([standardise(values) for values in found.values()], axis=0)
    return {"quality": mean} | {f"quality_{name}": values for name, values in found.items()}


def distances(pairs: Dataset, ood: OodConfig, cache: Path) -> tuple[np.ndarray, float]:
    """Distance [N] of each pair to the reward model's training pairs, and that of the ``quantile`` of pairs held back.

    The distance of a pair is the larger of its two responses'. Half of the training pairs fit means and covariance, the
    other half, which has not been fitted to, gives the quantile.

    Raises:
        AlignError: the model or its pairs cannot be used.
    """
    from align.pairs import fingerprint, load_pairs

    known = load_pairs(ood.pairs)
    key = digest([fingerprint_source(ood.model), fingerprint(known), ood.quantile])[:16]
    folder = cache / f"ood-{key}"
    features = _Features(ood.model)
    half = np.random.default_rng(0).permutation(len(known)) < len(known) // 2
    fitted: dict[str, np.ndarray] = {}
    if not (folder / "fit" / f"{0:010d}.npz").exists():
        first, second = features(known.select(np.flatnonzero(half))), features(known.select(np.flatnonzero(~half)))
        classes = np.tile([0, 1], len(first) // 2)
        model = Mahalanobis.fit(first, classes)
        limit = np.quantile(_pair_distance(model, second), ood.quantile)
        made = {"means": model.means[None], "whitening": model.whitening[None], "limit": np.array([limit])}
        in_parts(lambda start, stop: made, 1, folder / "fit", what="distances: fit")
    fitted = gathered(folder / "fit", 1, ("means", "whitening", "limit"))
    model = Mahalanobis(fitted["means"][0], fitted["whitening"][0])
    in_parts(partial(_distance, pairs, features, model), len(pairs), folder, what="distances", rows=ROWS)
    return gathered(folder, len(pairs), ("ood",), ROWS)["ood"], float(fitted["limit"][0])


class _Once:
    """A quality scorer that is loaded when the first part is missing."""

    def __init__(self, name: str, model: str | None) -> None:
        self.name, self.model = name, model
        self.scorer: QualityScorer | None = None

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        if self.scorer is None:
            self.scorer = make_scorer(self.name, self.model)
        return self.scorer.score(prompts, completions)


class _Features:
    """Features of the reward model's head, chosen and rejected in turn, [2 N, D]; the model is loaded when needed.

    Of an ensemble, those of its first member: features of two members are of two spaces and have no mean.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.scorer: object | None = None

    def __call__(self, pairs: Dataset) -> np.ndarray:
        from reward_models.features import head_features
        from reward_models.score import RewardScorer
        from reward_models.text import render

        if self.scorer is None:
            self.scorer = RewardScorer(self.model, batch_tokens=4096, max_length=1024)
        scorer = self.scorer
        assert isinstance(scorer, RewardScorer)
        rendered = [
            render(row["prompt"], row[side], scorer.tokenizer) for row in pairs for side in ("chosen", "rejected")
        ]
        return head_features(scorer, rendered)


def _distance(pairs: Dataset, features: _Features, model: Mahalanobis, start: int, stop: int) -> Arrays:
    return {"ood": _pair_distance(model, features(pairs.select(range(start, stop))))}


def _pair_distance(model: Mahalanobis, features: np.ndarray) -> np.ndarray:
    """[N] from the features of chosen and rejected in turn."""
    return np.sqrt(model.squared(features).reshape(-1, 2).max(axis=1))


def _quality(pairs: Dataset, scorer: QualityScorer, start: int, stop: int) -> Arrays:
    strings = texts(pairs, start, stop)
    prompts, chosen, rejected = (strings[k::3].to_pylist() for k in range(3))
    return {"quality": pair_quality(scorer, prompts, chosen, rejected)}


def _numbers(pairs: Dataset, name: str) -> np.ndarray:
    values: np.ndarray = cells(pairs, name).to_numpy().astype(np.float64)
    return values
