"""A run keeps the columns that it does not read, whatever their names; no training sees them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from align.config import LossSection, RunConfig, TrainSection
from align.data.pairs import read_pairs
from align.io.files import read_json
from align.run.pipeline import run_pipeline
from align.training.train import train_policy
from tests.helpers.builders import bert_reward, rows
from tests.training.test_trainer import FIELDS

OWN: dict[str, list[Any]] = {
    "source": ["web", None, "book"],
    "fold": [7, 8, 9],
    "meta": [{"a": 1}, {"b": [None]}, {}],
    "text": ["x", 3, None],
}


def given(count: int, name: str = "p") -> list[dict[str, Any]]:
    own = [{key: values[k % 3] for key, values in OWN.items()} for k in range(count)]
    texts = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(count)]
    return [row | {"id": f"{name}{k}", "prompt": f"{name} {k}:"} | own[k] for k, row in enumerate(texts)]


def read(table: Dataset) -> dict[str, list[Any]]:
    """Id -> the user's cells of the row."""
    return {row["id"]: [row[key] for key in OWN] for row in table}


@pytest.mark.parametrize("reward", [{"folds": 2}, {"held": True}])
def test_every_table_of_a_run_has_them(tmp_path: Path, reward: dict[str, Any]) -> None:
    """Tables of pairs, cross-fitted and other margins, and a filter's tables; a column ``fold`` is the user's."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given(30)))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given(9, "h")))
    if reward.pop("held", False):
        reward["eval_pairs"] = {"path": str(tmp_path / "held.jsonl")}
    tree = {
        "name": "r", "output_dir": str(tmp_path), "pairs": {"path": str(tmp_path / "pairs.jsonl")},
        "reward": {"model": str(bert_reward(tmp_path / "m")), "head": "naive-bayes", "max_length": 64, **reward},
    }  # fmt: skip
    run_pipeline(RunConfig.model_validate(tree), command="", until=("margins",))
    expected = {row["id"]: [row[key] for key in OWN] for row in (*given(30), *given(9, "h"))}
    tables = ["pairs/train", "pairs/heldout", "reward/heldout", "reward/in_sample", "margins/pairs"]
    for name in [*tables, *(["crossfit/pairs"] if "folds" in reward else [])]:
        found = read(read_pairs(tmp_path / "r" / name))
        assert found == {key: expected[key] for key in found}, name
        assert any(values[0] is not None for values in found.values())


def test_no_training_reads_them(tiny_policy: Path, tmp_path: Path) -> None:
    """Columns with the names of what trainers make or take are those of the user, and change nothing."""
    names = {"images": "a.png", "row": 3, "input_ids": [1], "labels": None, "messages": "x", "completion": "y"}
    config = TrainSection(model=str(tiny_policy), methods={"m": LossSection(loss="dpo")}, trainer=FIELDS)
    weights = []
    for name, table in (("plain", rows(8)), ("own", [row | names for row in rows(8)])):
        train_policy(Dataset.from_list(table), config, "m", tmp_path / name, seed=0)
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def untimed(found: Any) -> Any:
    """JSON values without the seconds that anything took."""
    if isinstance(found, dict):
        return {name: untimed(value) for name, value in found.items() if "seconds" not in name}
    return [untimed(one) for one in found] if isinstance(found, list) else found


def test_no_held_out_evaluation_reads_them(tiny_policy: Path, tmp_path: Path) -> None:
    """Own columns of held-out pairs, with names that trainers use too, change no number of an evaluation."""
    names = {"images": "a.png", "row": 3, "input_ids": [1], "labels": None, "prompt_ids": "x", "meta": {"a": [None]}}
    found = []
    for name, own in (("plain", {}), ("own", names)):
        table = [row | own | {"id": f"h{k}", "prompt": f"h {k} :"} for k, row in enumerate(rows(6))]
        for file, content in ((f"{name}.jsonl", table), ("pairs.jsonl", [row | names for row in rows(8)])):
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in content))
        tree = {
            "name": name, "output_dir": str(tmp_path / "runs"), "pairs": {"path": str(tmp_path / "pairs.jsonl")},
            "train": {"model": str(tiny_policy), "methods": {"dpo": {"loss": "dpo"}},
                      "trainer": FIELDS | {"max_steps": 2}, "eval_pairs": {"path": str(tmp_path / f"{name}.jsonl")}},
        }  # fmt: skip
        run_pipeline(RunConfig.model_validate(tree), command="")
        found.append(read_json(tmp_path / "runs" / name / "train-dpo" / "history.json")["held_out"])
    assert untimed(found[0]) == untimed(found[1]) and len(json.dumps(found[0])) > 500
