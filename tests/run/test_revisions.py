"""A raised revision changes the key of every cached result: in its manifest, or in the name of its folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from align.commands.build_pairs import BuildSettings, build_pairs
from align.commands.evaluation_tables import Written, score
from align.config import RunConfig
from align.evaluation.policies import Policy
from align.generation.types import Sampling
from align.io.stage import MANIFEST
from align.run import pipeline
from reward_models import ensemble, pairwise_judges, scorers
from reward_models.ensemble import score_with
from reward_models.pairwise_judges import judge_key, make_score_judge
from reward_models.scorers import ScorerSpec
from tests.helpers.builders import bert_reward, rows

STAGES = ("pairs", "reward", "crossfit", "margins")


def manifest_keys(folder: Path) -> dict[str, str]:
    """Path of each manifest below a folder -> the key in it."""
    files = sorted(folder.rglob(MANIFEST))
    return {str(file.relative_to(folder)): json.loads(file.read_text())["key"] for file in files}


def assert_revised(make: Callable[[], dict[str, str]], raise_revision: Callable[[], None]) -> None:
    """Check that the keys are the same twice, and that all differ after the revision is raised."""
    before = make()
    assert before and make() == before
    raise_revision()
    assert not set(make().values()) & set(before.values())


def test_stages_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows(24))
    (tmp_path / "pairs.jsonl").write_text(lines)
    tree = {
        "name": "r", "output_dir": str(tmp_path / "runs"), "pairs": {"path": str(tmp_path / "pairs.jsonl")},
        "reward": {"model": str(bert_reward(tmp_path / "m")), "head": "logistic", "folds": 2, "eval_fraction": 0.3},
    }  # fmt: skip
    config = RunConfig.model_validate(tree)

    def make() -> dict[str, str]:
        pipeline.run_pipeline(config, command="align run")
        found = manifest_keys(config.folder)
        assert set(found) == {f"{stage}/{MANIFEST}" for stage in STAGES}
        return found

    revisions = dict.fromkeys(pipeline.REVISIONS, -1)
    assert_revised(make, lambda: monkeypatch.setattr(pipeline, "REVISIONS", revisions))


def test_pairs_built_with_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completions = [
        {"id": "a", "prompt": "the film is", "sample": k, "completion": text}
        for k, text in enumerate((" good", " bad"))
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    settings = BuildSettings(ScorerSpec(judge="vader"))

    def make() -> dict[str, str]:
        build_pairs(tmp_path / "completions.jsonl", settings, tmp_path / "out")
        return manifest_keys(tmp_path / "out")

    assert_revised(make, lambda: monkeypatch.setattr(scorers, "REWARDS", -1))


def test_scores_of_a_reward_model_as_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(bert_reward(tmp_path / "m"))
    written = Written(Policy("p", "p"), ["the film is"], Sampling(1), Dataset.from_dict({"text": [" good"]}), "key")
    judge = make_score_judge(model)

    def make() -> dict[str, str]:
        score(written, judge, tmp_path / "out")
        return manifest_keys(tmp_path / "out")

    others = {kind: judge_key(f"{kind}{model}") for kind in ("yes-no:", "llm:")}
    before = make()
    assert len(before) == 1 and make() == before
    monkeypatch.setattr(pairwise_judges, "REWARDS", -1)
    assert len(set(make().values())) == 2  # the folder of the earlier scores stays
    assert all(judge_key(f"{kind}{model}") != key for kind, key in others.items())


def test_unfinished_scores_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of a stopped scoring are in a folder that is named by the revision, among others."""
    model, pairs = bert_reward(tmp_path / "m"), Dataset.from_list(rows(3))
    monkeypatch.setattr(ensemble.shutil, "rmtree", lambda _: None)  # as if the scoring was stopped at its end

    def shards() -> set[str]:
        score_with([model], pairs, tmp_path / "scored", batch_tokens=64, max_length=64)
        return {folder.name for folder in (tmp_path / "scored").iterdir()}

    before = shards()
    assert len(before) == 1 and shards() == before
    monkeypatch.setattr(ensemble, "REWARDS", -1)
    assert len(shards()) == 2
