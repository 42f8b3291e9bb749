"""A run marks the margins of its stages: held-out, in-sample, cross-fitted, and those of a table trained on twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.config import RunConfig
from align.data.pairs import read_pairs
from align.io.files import read_json
from align.run.pipeline import run_pipeline
from align.trust.measure import margin_source
from tests.helpers.builders import bert_reward, rows


def table(folder: Path, name: str, count: int) -> dict[str, str]:
    texts = [row | {"id": f"{name} {k}", "prompt": f"{name} {k}:"} for k, row in enumerate(rows(count))]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {"path": str(folder / f"{name}.jsonl")}


def run(folder: Path, **reward: Any) -> Path:
    tree = {
        "name": "r", "output_dir": str(folder), "pairs": table(folder, "own", 30),
        "reward": {"model": str(bert_reward(folder / "m")), "head": "naive-bayes", "max_length": 64, **reward},
    }  # fmt: skip
    run_pipeline(RunConfig.model_validate(tree), command="", until=("margins",))
    return folder / "r"


def test_each_table_of_a_run_says_where_its_margins_come_from(tmp_path: Path) -> None:
    root = run(tmp_path, folds=2)
    expected = {
        "reward/heldout": "outside", "reward/in_sample": "in-sample", "crossfit/pairs": "cross-fitted",
        "margins/pairs": "cross-fitted",
    }  # fmt: skip
    for name, source in expected.items():
        pairs = read_pairs(root / name)
        assert set(pairs["margin_source"]) == {source}
        assert margin_source(root / name, pairs) == margin_source(root / name) == source


@pytest.mark.parametrize(("shared", "source"), [(True, "in-sample"), (False, "outside")])
def test_another_table_is_outside_only_if_its_texts_are_others(tmp_path: Path, shared: bool, source: str) -> None:
    """The reward model's own table given twice, as `pairs` and as `reward.pairs`, is no witness from outside."""
    root = run(tmp_path, pairs=table(tmp_path, "own" if shared else "other", 30))
    found = read_json(root / "margins" / "metrics.json")
    assert found["margins"] == source == margin_source(root / "margins" / "pairs")
    assert bool(found["note"]) == shared
    marked = list(read_pairs(root / "margins" / "pairs")["margin_source"])
    assert ("in-sample" in marked) == shared
