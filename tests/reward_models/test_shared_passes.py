"""What reward models compute once: features of a stage, repeated responses; and how little a token of a pair takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from align.config import RewardSection
from reward_models.crossfit import FOLD, cross_fit
from reward_models.ensemble import members, score_with
from reward_models.features import FeatureStore, features_of
from reward_models.linear_heads import train_head
from reward_models.score import RewardScorer
from reward_models.token_rows import PairNames, SegmentedIds, TokenRows, first_of_equals, row_key
from tests.helpers.builders import bert_reward, llama_reward, rows


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of token ids in each forward pass of a reward model."""
    seen: list[int] = []
    real = RewardScorer.forward

    def counting(self: RewardScorer, given: list[list[int]]) -> Any:
        seen.append(len(given))
        return real(self, given)

    monkeypatch.setattr(RewardScorer, "forward", counting)
    return seen


def texts_of(table: list[dict[str, Any]]) -> set[str]:
    return {row["prompt"] + row[side] for row in table for side in ("chosen", "rejected")}


@pytest.mark.parametrize(("build", "rounding"), [(llama_reward, 1e-5), (bert_reward, 1e-3)])
def test_a_stage_reads_each_text_once(build: Any, rounding: float, tmp_path: Path, passes: list[int]) -> None:
    """Folds, members and scoring of frozen heads share features; margins are those of models on their own.

    The sums of this encoder's rewards have terms a thousand times as large, and so has their rounding in float32.
    """
    config = RewardSection(model=str(build(tmp_path / "b")), max_length=64, head="logistic", folds=3, ensemble=2)
    pairs = Dataset.from_list(rows(18))
    found = cross_fit(pairs, config, tmp_path / "folds", seed=0)
    assert sum(passes) == len(texts_of(rows(18)))
    assert not (tmp_path / "folds" / "features").exists()
    for fold in range(3):
        own = np.flatnonzero(np.asarray(found[FOLD]) == fold)
        models = members(tmp_path / "folds" / f"fold-{fold}")
        alone = score_with(models, pairs.select(own), tmp_path / "s", batch_tokens=512, max_length=64)
        for name in ("reward_chosen", "margin", "margin_std"):
            assert np.asarray(found[name])[own] == pytest.approx(np.asarray(alone[name]), rel=rounding, abs=rounding)


def test_a_head_from_stored_features_is_the_same_to_the_bit(tmp_path: Path, passes: list[int]) -> None:
    config = RewardSection(model=str(llama_reward(tmp_path / "b")), max_length=64, head="logistic")
    pairs = Dataset.from_list(rows(12))
    (first, _), (again, _) = (train_head(pairs, config, seed=0, cache=tmp_path / "cache") for _ in range(2))
    assert torch.equal(first.score.weight, again.score.weight)
    distinct, before = (
        len({row["prompt"] + row[side] for row in rows(12) for side in ("chosen", "rejected")}),
        sum(passes),
    )
    assert before == distinct
    (alone, _) = train_head(pairs, config, seed=0)
    assert torch.equal(first.score.weight, alone.score.weight) and sum(passes) == 2 * distinct


def test_another_backbone_has_other_features(tmp_path: Path) -> None:
    """Stored features are found by weights and by what is read, not by a folder's name or the head."""
    scorer = RewardScorer(llama_reward(tmp_path / "b"), batch_tokens=512, max_length=64)
    ids = [[1, 5, 6, 7], [1, 5, 9]]
    first = features_of(scorer, ids, FeatureStore(tmp_path / "cache", scorer))
    keys = [row_key(row) for row in ids]
    with torch.no_grad():
        scorer.model.score.weight.add_(1)
        assert all(key in FeatureStore(tmp_path / "cache", scorer) for key in keys)
        scorer.model.model.norm.weight.mul_(2)
    store = FeatureStore(tmp_path / "cache", scorer)
    assert not any(key in store for key in keys)
    assert features_of(scorer, ids, store) == pytest.approx(2 * first, rel=1e-5)


def test_repeated_responses_are_scored_once(tmp_path: Path, passes: list[int]) -> None:
    scorer = RewardScorer(llama_reward(tmp_path / "b"), batch_tokens=512, max_length=64)
    table = rows(6)
    expected = scorer.score_pairs(Dataset.from_list(table))
    passes.clear()
    many = [{**row, "id": f"{row['id']}-{k}"} for row in table for k in range(5)]
    found = scorer.score_pairs(Dataset.from_list(many))
    assert sum(passes) == len(texts_of(table))
    assert np.asarray(found["margin"]) == pytest.approx(np.repeat(np.asarray(expected["margin"]), 5), abs=1e-6)
    passes.clear()
    rewards = scorer.score_completions(["the film is"] * 8, [" good", " bad"] * 4)
    assert sum(passes) == 2 and rewards.tolist() == rewards[:2].tolist() * 4


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@given(st.lists(st.tuples(tokens, st.integers(-1, 5)), max_size=9))
def test_rows_of_tokens_are_the_lists_that_they_were_made_of(drawn: list[tuple[list[int], int]]) -> None:
    made = []
    for ids, second in drawn:
        made.append(ids if second < 0 else SegmentedIds(ids))
        if second >= 0:
            made[-1].second = second  # type: ignore[attr-defined]
    packed = TokenRows(made)
    assert list(packed) == made and len(packed) == len(made) and packed.lengths().tolist() == [*map(len, made)]
    assert [getattr(row, "second", -1) for row in packed] == [second for _, second in drawn]
    assert packed.segmented == any(second >= 0 for _, second in drawn)
    assert packed.arrow().to_pylist() == made and packed[1:3] == TokenRows(made[1:3])
    firsts, source = first_of_equals([row_key(row) for row in made])
    assert [made[firsts[k]] for k in source] == made
    assert len(firsts) == len({(tuple(row), getattr(row, "second", -1)) for row in made})


def test_a_pair_of_tokens_takes_at_most_12_bytes_a_token() -> None:
    """Ids in Arrow and names together; pairs are named by their ids, the last of equal ones, as the guard needs."""
    rng = np.random.default_rng(0)
    sides = [TokenRows(rng.integers(0, 50_000, 100).tolist() for _ in range(50)) for _ in range(2)]
    columns = {"chosen_ids": sides[0].arrow(), "rejected_ids": sides[1].arrow()}
    assert sum(column.nbytes for column in columns.values()) <= 4.2 * 2 * 50 * 100
    table = Dataset.from_dict(
        {name: column.to_pylist() for name, column in columns.items()} | {"id": [*map(str, range(50))]}
    )
    names = PairNames(table)
    assert names._keys.nbytes + names._rows.nbytes == 16 * 50
    assert [names.of(table[k]["chosen_ids"], table[k]["rejected_ids"]) for k in (0, 31, 49)] == ["0", "31", "49"]
    assert names.of(table[0]["rejected_ids"], table[0]["chosen_ids"]) == "unknown"
    twice = Dataset.from_dict({"chosen_ids": [[1], [1]], "rejected_ids": [[2], [2]]})
    assert PairNames(twice).of([1], [2]) == "1"
