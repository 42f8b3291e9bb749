"""All scoring with a reward-model folder takes the mean over the members of its ensemble."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from align.commands.evaluate_reward_model import evaluate
from align.config import PairsSection, RewardSection
from align.data.training_pairs import write_record
from align.run.stages.reward import make_scorer
from reward_models.ensemble import EnsembleScorer, members, score_with
from reward_models.pairwise_judges import make_score_judge
from reward_models.score import RewardScorer
from reward_models.scorers import ScorerSpec
from tests.helpers.builders import bert_reward, llama_reward, rows

PROMPTS = ["the film is", "a very bad plot was not", "good"]
TEXTS = [" good", " awful film", " great great"]
BUDGET = {"batch_tokens": 256, "max_length": 64}


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    """A decoder, and below it an encoder as its second member."""
    folder = llama_reward(tmp_path / "rm")
    bert_reward(folder / "members" / "1")
    return folder


def means(folder: Path) -> np.ndarray:
    alone = [RewardScorer(model, **BUDGET).score_completions(PROMPTS, TEXTS) for model in members(folder)]
    assert len(alone) == 2 and np.abs(alone[0] - alone[1]).min() > 1e-3
    return np.mean(alone, axis=0)


SCORERS: dict[str, Callable[[Path], np.ndarray]] = {
    "ensemble scorer": lambda folder: EnsembleScorer(folder, **BUDGET).score_completions(PROMPTS, TEXTS),
    "generation": lambda folder: ScorerSpec(reward_model=str(folder)).load()(PROMPTS, TEXTS),
    "evaluation": lambda folder: make_score_judge(str(folder)).score(PROMPTS, TEXTS),
    "stages": lambda folder: make_scorer(folder, RewardSection(model="m")).score_completions(PROMPTS, TEXTS),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_is_the_mean_of_the_members(ensemble: Path, name: str) -> None:
    assert SCORERS[name](ensemble) == pytest.approx(means(ensemble), abs=1e-5)


def test_pairs_one_member_at_a_time_or_all_at_once(ensemble: Path, tmp_path: Path) -> None:
    pairs = Dataset.from_list(rows(5))
    together = EnsembleScorer(ensemble, **BUDGET).score_pairs(pairs)
    one_by_one = score_with(members(ensemble), pairs, tmp_path / "scored", **BUDGET)
    for column in ("reward_chosen", "reward_rejected", "margin", "margin_std"):
        assert together[column][:] == pytest.approx(one_by_one[column][:], abs=1e-6)
    assert "margin_std" not in EnsembleScorer(ensemble / "members" / "1", **BUDGET).score_pairs(pairs).column_names


def test_a_reward_model_is_evaluated_with_all_its_members(ensemble: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    source = PairsSection(path=str(tmp_path / "pairs.jsonl"))
    write_record(Dataset.from_list(rows(8)), Path(members(ensemble)[0]))
    evaluate(source, str(ensemble), tmp_path / "out", chat=None, batch_tokens=256, max_length=64, seed=0)
    found = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    margins = found["margins"]
    assert found["said"][0].startswith("8 of these 8 pairs were trained on by this model: the numbers are in-sample")
    assert "8 of these 8 pairs were trained on" in (tmp_path / "out" / "reward_model.html").read_text()
    expected = score_with(members(ensemble), Dataset.from_list(rows(8)), tmp_path / "scored", **BUDGET)["margin"]
    assert margins == pytest.approx(expected[:], abs=1e-5)
    new = [row | {"prompt": f"another {row['prompt']}"} for row in rows(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    evaluate(source, str(ensemble), tmp_path / "new", chat=None, batch_tokens=256, max_length=64, seed=0)
    found = json.loads((tmp_path / "new" / "reward_model.json").read_text())
    assert found["run"]["pairs_trained_on"] == 0 and not any("trained on" in said for said in found["said"])
