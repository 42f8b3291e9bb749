"""Best-of-n: the estimate against every subset, against the closed form, and its bound on the KL; what is written."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from align.commands.best_of_n import BestSettings, best_of_n_curve, choose_best
from align.errors import AlignError, ConfigError, DataError, NumericsError
from align.generation.best_of_n import best_index, best_of_weights, expected_best, kl_bound
from reward_models.judges import make_judge
from reward_models.scorers import ScorerSpec, parse_scorer, score_in_chunks
from tests.generation.test_pair_build import VADER, completions
from tests.helpers.builders import bert_reward

ROWS = st.integers(1, 7).flatmap(
    lambda count: st.lists(
        st.lists(st.tuples(st.integers(-2, 2), st.floats(-5, 5)), min_size=count, max_size=count),
        min_size=1,
        max_size=3,
    )
)


@given(ROWS)
def test_the_estimate_is_the_mean_over_every_subset(rows: list[list[tuple[int, float]]]) -> None:
    """Mean value of the best by score over all subsets of n of the N samples, equal scores included."""
    scores = np.array([[float(score) for score, _ in row] for row in rows])
    values = np.array([[value for _, value in row] for row in rows])
    found = expected_best(scores, values)
    for p in range(len(rows)):
        for n in range(1, scores.shape[1] + 1):
            subsets = list(combinations(range(scores.shape[1]), n))
            best = [subset[best_index(scores[p, list(subset)].tolist())] for subset in subsets]
            assert found[p, n - 1] == pytest.approx(np.mean(values[p, best]), abs=1e-9)


@given(st.integers(1, 200))
def test_the_weights_are_binomials_and_sum_to_one(count: int) -> None:
    weights = best_of_weights(count)
    assert weights.sum(axis=1) == pytest.approx(np.ones(count))
    n, rank = max(1, count // 2), count - 1 - count // 5
    assert weights[n - 1, rank] == pytest.approx(math.comb(rank, n - 1) / math.comb(count, n))


def test_of_uniform_scores_the_best_of_n_has_the_mean_n_over_n_plus_1() -> None:
    scores = np.random.default_rng(0).random((20_000, 6))
    found = expected_best(scores, scores).mean(axis=0)
    assert found == pytest.approx([n / (n + 1) for n in range(1, 7)], abs=0.006)


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_the_kl_of_continuous_scores_is_the_bound(n: int) -> None:
    """The best of n has the density n u^(n-1) at quantile u of the score."""
    exact, _ = quad(lambda u: n * u ** (n - 1) * math.log(n * u ** (n - 1)) if u > 0 else 0.0, 0, 1)
    assert kl_bound(n) == pytest.approx(exact, abs=1e-6)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(1, 50))
def test_the_kl_of_few_answers_is_at_most_the_bound(weights: list[float], n: int) -> None:
    p = np.array(weights) / sum(weights)
    reached = np.concatenate([[0.0], np.minimum(p.cumsum(), 1.0)])
    best = np.diff(reached**n)
    kl = sum(b * math.log(b / a) for b, a in zip(best, p, strict=True) if b > 0)
    assert kl <= kl_bound(n) + 1e-9


def test_another_judge_sees_what_the_score_does_not() -> None:
    """Gold that is independent of the score does not change with n; gold that the score contradicts falls."""
    rng = np.random.default_rng(1)
    scores, other = rng.normal(size=(2, 4000, 8))
    curve = best_of_n_curve(scores, other, seed=0)
    assert curve[-1]["gain"]["low"] > 1.3 and curve[-1]["gold_gain"]["low"] < 0 < curve[-1]["gold_gain"]["high"]
    assert best_of_n_curve(scores, -scores, seed=0)[-1]["gold_gain"]["high"] < -1.3
    assert curve[0]["gain"] == {"value": 0.0, "low": None, "high": None, "n": 4000}
    assert [row["n"] for row in curve] == list(range(1, 9)) and best_of_n_curve(scores, None, seed=0)[3]["gold"] is None


TEXTS = {
    "a": [" wonderful", " awful", " wonderful"],
    "b": ["", " bad", " a table"],
    "c": [" a chair", " a table", " a chair"],
}


def test_the_best_of_each_prompt_and_every_score(tmp_path: Path) -> None:
    file = completions(tmp_path / "c.jsonl", TEXTS, tokens=2, group="g")
    reward = str(bert_reward(tmp_path / "reward"))
    choose_best(file, BestSettings(VADER, gold=ScorerSpec(reward_model=reward)), tmp_path / "out")
    best = pq.read_table(tmp_path / "out" / "completions.parquet").to_pylist()
    assert [(row["id"], row["sample"], row["completion"]) for row in best] == [
        ("a", 0, " wonderful"), ("b", 0, ""), ("c", 0, " a chair"),
    ]  # fmt: skip
    assert all(row["tokens"] == 2 and row["group"] == "g" and row["prompt"] == f"it is {row['id']}" for row in best)
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    prompts, texts = [f"it is {row['id']}" for row in scores], [text for group in TEXTS.values() for text in group]
    assert [row["score"] for row in scores] == pytest.approx(make_judge("vader").score(prompts, texts))
    gold = ScorerSpec(reward_model=reward).load()(prompts, texts)
    assert [row["gold"] for row in scores] == pytest.approx(gold, abs=1e-5)
    assert [row["gold"] for row in best] == pytest.approx(gold[[0, 3, 6]], abs=1e-5)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["prompts"], metrics["n"], metrics["scorer"], metrics["gold"]) == (3, 3, "vader", reward)
    assert metrics["curve"][-1]["score"]["value"] == pytest.approx(np.mean([row["score"] for row in best]))
    assert metrics["curve"][0]["gold"]["value"] == pytest.approx(gold.mean(), abs=1e-5)
    assert not list((tmp_path / "out").glob("parts-*"))
    assert choose_best(file, BestSettings(VADER, gold=ScorerSpec(reward_model=reward)), tmp_path / "out").skipped
    lines = choose_best(file, BestSettings(VADER, format="jsonl"), tmp_path / "out")
    written = [json.loads(line) for line in (lines.folder / "completions.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in written] == [0, 0, 0] and "gold" not in written[0]


def test_a_stopped_scoring_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_models.scorers.CHUNK", 4)
    seen: list[str] = []

    def load(self: ScorerSpec) -> Any:
        def score(prompts: Any, texts: Any) -> np.ndarray:
            if len(seen) == 8:
                raise KeyboardInterrupt
            seen.extend(texts)
            return np.arange(float(len(texts)))

        return score

    monkeypatch.setattr(ScorerSpec, "load", load)
    file = completions(tmp_path / "c.jsonl", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        choose_best(file, BestSettings(VADER), tmp_path / "out")
    assert len(seen) == 8 and not (tmp_path / "out").exists()
    seen.clear()
    choose_best(file, BestSettings(VADER), tmp_path / "out")
    assert len(seen) == 1


def test_mistakes_are_named(tmp_path: Path) -> None:
    uneven = completions(tmp_path / "c.jsonl", TEXTS | {"d": [" one"]})
    with pytest.raises(DataError, match=r"(?s)1 prompts have another number of completions than the 3.*d: found 1"):
        choose_best(uneven, BestSettings(VADER), tmp_path / "out")
    with pytest.raises(ConfigError, match="--gold vader: found the judge that chooses"):
        BestSettings(VADER, gold=VADER)
    with pytest.raises(ConfigError, match="did you mean `vader`"):
        parse_scorer("vadr", batch_tokens=1, max_length=1)
    assert parse_scorer(str(tmp_path), batch_tokens=1, max_length=1).reward_model == str(tmp_path)
    assert parse_scorer("yes-no:some/model", batch_tokens=1, max_length=1).probabilities
    with pytest.raises(NumericsError, match="completion 2: found the score nan, expected a finite number"):
        score_in_chunks(lambda: lambda p, c: np.array([1.0, np.nan]), ["", ""], ["a", "b"], tmp_path / "parts")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    with pytest.raises(AlignError, match="found other files there"):
        choose_best(completions(tmp_path / "c.jsonl", TEXTS), BestSettings(VADER), tmp_path / "taken")
