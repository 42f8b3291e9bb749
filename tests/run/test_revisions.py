"""What is kept under an earlier revision is made again: a raised one is another key wherever results are kept."""

from pathlib import Path

import pytest
from datasets import Dataset

from align.config import PairsSection, RewardSection, RunConfig
from align.run import pipeline
from reward_models import ensemble
from reward_models import pairwise_judges as judges
from reward_models import scorers as scoring
from reward_models.scorers import ScorerSpec
from tests.helpers.builders import bert_reward, rows


def test_a_raised_revision_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert_reward(tmp_path / "m")
    run = RunConfig(name="r", pairs=PairsSection(path="p.jsonl"), reward=RewardSection(model=str(model)))
    pairs = Dataset.from_list(rows(3))

    def keys() -> list[object]:
        runner = pipeline._Runner(run, tmp_path)
        stages = [runner._inputs(stage) for stage in ("reward", "crossfit", "margins")]
        kept = [ensemble._key([model], pairs, 64), ScorerSpec(reward_model=str(model)).key]
        return [*stages, *kept, *(judges.judge_key(f"{kind}{model}") for kind in ("", "yes-no:", "llm:"))]

    before = keys()
    assert before == keys()
    for module in (judges, scoring, ensemble):
        monkeypatch.setattr(module, "REWARDS", -1)
    monkeypatch.setattr(pipeline, "STAGES", dict.fromkeys(pipeline.STAGES, -1))
    assert all(one != other for one, other in zip(before, keys(), strict=True))
