"""A run marks the margins of its stages: held-out, in-sample, cross-fitted, and those of a table trained on twice."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config import RewardSection, RunConfig
from align.data.pairs import read_pairs
from align.io.files import read_json
from align.run.pipeline import run_pipeline
from align.trust.measure import margin_source
from reward_models.ensemble import score_with
from reward_models.loading import LoadOptions
from tests.helpers.builders import bert_reward, rows


def table(folder: Path, name: str, count: int) -> dict[str, str]:
    texts = [row | {"id": f"{name} {k}", "prompt": f"{name} {k}:"} for k, row in enumerate(rows(count))]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {"path": str(folder / f"{name}.jsonl")}


def run(folder: Path, **reward: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tree = {
        "name": "r", "output_dir": str(folder), "pairs": table(folder, "own", 30),
        "reward": {"model": str(bert_reward(folder / "m")), "head": "naive-bayes", "max_length": 64, **reward},
    }  # fmt: skip
    run_pipeline(RunConfig.model_validate(tree), command="", until=("margins",))
    return folder / "r"


def test_each_table_of_a_run_says_where_its_margins_come_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the table and its metrics; the path of the cross-fitted one that the log names is there after the run."""
    caplog.set_level(logging.INFO, "align")
    root = run(tmp_path, folds=2)
    (named,) = [message for message in caplog.messages if message.startswith("cross-fitted margins: ")]
    assert set(read_pairs(Path(named.split()[2].rstrip(";")).parent)["margin_source"]) == {"cross-fitted"}
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


def test_a_run_scores_in_the_dtype_that_it_names(tmp_path: Path) -> None:
    """Its margins are those of `reward score --dtype`, and no key says nothing of float32."""
    plain, low = run(tmp_path / "a"), run(tmp_path / "b", dtype="bfloat16")
    pairs = read_pairs(low / "margins" / "pairs")
    scorers = {name: LoadOptions(dtype=name) for name in ("float32", "bfloat16")}
    margins = {
        name: np.asarray(
            score_with([low / "reward" / "model"], pairs, tmp_path / name, batch_tokens=4096, max_length=64,
                       options=options)["margin"]
        )
        for name, options in scorers.items()
    }  # fmt: skip
    assert np.array_equal(np.asarray(pairs["margin"]), margins["bfloat16"])
    apart = np.abs(margins["bfloat16"] / margins["float32"] - 1).max()
    assert 0 < apart < 0.05
    assert not np.array_equal(np.asarray(read_pairs(plain / "margins" / "pairs")["margin"]), margins["bfloat16"])
    section = {"model": "m", "dtype": None}
    assert "dtype" not in RewardSection.model_validate(section).made_from(without=set())
