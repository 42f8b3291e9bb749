"""Mahalanobis distances to a reward model's training pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.config import OodSection, PairsSection
from align.errors import DataError
from align.filtering.ood import Mahalanobis, ledoit_wolf
from align.filtering.score_columns import distances
from tests.helpers.builders import bert_reward, llama_reward, tokenizer


@pytest.mark.parametrize("count", [12, 400])
def test_shrinkage_is_that_of_scikit_learn(count: int) -> None:
    from sklearn.covariance import LedoitWolf

    rows = np.random.default_rng(0).normal(size=(count, 30)) * np.arange(1, 31)
    rows -= rows.mean(axis=0)
    assert np.allclose(ledoit_wolf(rows), LedoitWolf(assume_centered=True).fit(rows).covariance_)


def test_mahalanobis_distance_of_a_gaussian() -> None:
    """The squared distance has the mean and the quantile of chi-squared; shifted points are farther away."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6)) + 3 * np.eye(6)
    means = np.array([[0.0] * 6, [40.0] * 6])
    classes = np.arange(8000) % 2
    rows = rng.normal(size=(8000, 6)) @ mix + means[classes]
    model = Mahalanobis.fit(rows, classes)
    squared = model.squared(rng.normal(size=(4000, 6)) @ mix + means[1])
    assert squared.mean() == pytest.approx(6, rel=0.05) and np.quantile(squared, 0.95) == pytest.approx(12.59, rel=0.05)
    whitened = np.linalg.inv(ledoit_wolf(rows - means[classes]))
    row = np.ones(6)
    assert model.squared(row[None])[0] == pytest.approx(row @ whitened @ row, rel=0.05)
    far = model.squared(rng.normal(size=(4000, 6)) @ mix + means[0] + 8 * np.ones(6))
    assert np.mean(far[:, None] > squared[None, :400]) > 0.9
    with pytest.raises(DataError, match="same features"):
        Mahalanobis.fit(np.ones((4, 3)), np.zeros(4, dtype=int))


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("build", [llama_reward, bert_reward])
def test_features_are_what_the_head_reads(build: Any, pad: str, tmp_path: Path) -> None:
    """The head applied to the features is the reward, for any padding side and padding token."""
    from reward_models.features import head_features
    from reward_models.score import RewardScorer

    texts = ["the film is good", "a bad plot", "good", "the a is was very not great awful fine dull"]
    model = build(tmp_path)
    if build is llama_reward:
        words = tokenizer()
        words.pad_token = pad
        words.save_pretrained(model)
    for side in ("left", "right"):
        scorer = RewardScorer(model, batch_tokens=30, max_length=64, padding_side=side)  # type: ignore[arg-type]
        features = head_features(scorer, texts)
        head = getattr(scorer.model, "score", None) or scorer.model.classifier
        bias = 0.0 if head.bias is None else head.bias.item()
        assert np.allclose(features @ head.weight.detach().numpy()[0] + bias, scorer.score_texts(texts), atol=1e-5)


def test_distances_to_the_training_pairs(tmp_path: Path) -> None:
    """New pairs like the training pairs are within the limit, pairs of other words farther away; both are cached."""
    rng = np.random.default_rng(0)

    def drawn(words: list[str], count: int) -> list[dict[str, str]]:
        def text(least: int) -> str:
            return " ".join(rng.choice(words, size=rng.integers(least, 9)))

        return [{"prompt": text(1), "chosen": f" {text(2)} a", "rejected": f" {text(2)} the"} for _ in range(count)]

    usual, strange = ["good", "bad", "film", "plot", "is", "was"], ["review", ":", "user", "assistant"]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn(usual, 400)))
    pairs = Dataset.from_list(drawn(usual, 60) + drawn(strange, 60))
    model = llama_reward(tmp_path / "model")
    ood = OodSection(model=str(model), pairs=PairsSection(path=str(tmp_path / "known.jsonl")))
    found, limit = distances(pairs, ood, tmp_path / "cache")
    assert np.mean(found[:60] <= limit) > 0.9 and np.mean(found[60:, None] > found[None, :60]) > 0.9
    again, same = distances(pairs, ood, tmp_path / "cache")
    assert np.array_equal(found, again) and same == limit
