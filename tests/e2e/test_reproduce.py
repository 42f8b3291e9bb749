"""`align reproduce`: the same run again, compared file by file."""

import json
from pathlib import Path

import numpy as np
import pytest

from align.models.loading import load_policy
from tests.helpers.bad_input_makers import RUN, build_workspace, message, run_command
from tests.helpers.builders import rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("reproduce")
    build_workspace(folder)
    code, _, errors = run_command(RUN, folder)
    assert code == 0, errors
    return folder


def test_a_run_is_reproduced_from_its_manifest_alone(workspace: Path) -> None:
    (workspace / "run.yaml").rename(workspace / "elsewhere.yaml")
    code, output, errors = run_command(("reproduce", "runs/tiny/run.json", "--output", "again"), workspace)
    assert code == 0, errors
    found = json.loads(output)
    files = json.loads((workspace / "runs" / "tiny" / "run.json").read_text())["files"]
    assert found == {"same_files": len(files), "other_inputs": [], "other_files": [], "other_versions": {}}
    assert "train-madpo/model/model.safetensors" in files and "reproduced:" in errors


def test_a_part_of_a_run_is_reproduced_as_far_as_it_went(workspace: Path) -> None:
    source = "elsewhere.yaml" if (workspace / "elsewhere.yaml").exists() else "run.yaml"
    count = len((workspace / "pairs.jsonl").read_text().splitlines())
    np.save(workspace / "vectors.npy", np.eye(count, dtype=np.float32))
    keys = ("--set", "name=filtered", "--set", "filter={keep: 0.9, embeddings: vectors.npy}")
    code, _, errors = run_command(("train", source, *keys), workspace)
    assert code == 0, errors
    code, output, errors = run_command(("reproduce", "runs/filtered/run.json", "--output", "again"), workspace)
    assert code == 0 and json.loads(output)["other_files"] == [], errors
    assert not (workspace / "again" / "filtered" / "evaluate").exists()


def test_another_input_is_named(workspace: Path) -> None:
    pairs = workspace / "pairs.jsonl"
    before = pairs.read_text()
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(7)))
    code, _, errors = run_command(("reproduce", "runs/tiny/run.json", "--output", "other"), workspace)
    pairs.write_text(before)
    assert code == 2 and "stage pairs: data, model or settings are not what they were" in message(errors)
    assert "pairs/train/pairs.parquet: another content" in message(errors)


def test_an_adapter_is_written_in_one_order(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = "[up_proj, v_proj, q_proj, o_proj, k_proj, gate_proj, down_proj]"
    peft = ("--set", f"train.peft={{r: 2, target_modules: {modules}}}", "--set", "name=adapter")
    source = "elsewhere.yaml" if (workspace / "elsewhere.yaml").exists() else "run.yaml"
    code, _, errors = run_command(("run", source, *peft), workspace)
    assert code == 0, errors
    folder = workspace / "runs" / "adapter" / "train-madpo" / "model"
    found = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert found == sorted(found) and len(found) == 7
    monkeypatch.chdir(workspace)
    assert load_policy(str(folder)).peft_config["default"].target_modules == set(found)


def test_a_manifest_that_is_none(workspace: Path) -> None:
    (workspace / "broken.json").write_text("{")
    for file, said in (("nowhere.json", "cannot be read"), ("broken.json", "not the manifest of a run")):
        code, _, errors = run_command(("reproduce", file, "--output", "x"), workspace)
        assert code == 2 and said in errors and "Traceback" not in errors
    code, _, errors = run_command(("reproduce", "runs/tiny/run.json", "--output", "runs"), workspace)
    assert code == 2 and "holds the run itself" in errors
