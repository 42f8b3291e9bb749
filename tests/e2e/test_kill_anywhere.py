"""A run that is killed anywhere ends as one that was left alone: scripts/kill/run.py on a whole tiny run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_cli import jsonl
from tests.helpers.builders import bert_reward, causal, rows
from tests.helpers.launching import ROOT, environment


def workspace(folder: Path) -> Path:
    """A run with every kind of stage, a checkpoint every second step; the path of its file."""
    causal(folder / "policy")
    bert_reward(folder / "backbone")
    table = [{name: value for name, value in row.items() if name != "margin"} for row in rows(24)]
    jsonl(folder / "pairs.jsonl", table)
    jsonl(folder / "heldout.jsonl", [{**row, "prompt": f"not {row['prompt']}"} for row in table[:8]])
    jsonl(folder / "prompts.jsonl", [{"prompt": f"the {row['prompt']}"} for row in table[:10]])
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    small = {"max_steps": 9, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, **saving}
    small |= {"lr_scheduler_type": "constant"}  # a step too many, or with other pairs, is seen in the weights
    run = {
        "name": "tiny",
        "reward": {
            "model": "backbone", "folds": 2, "max_length": 64, "trainer": small | {"learning_rate": 1e-3},
            "pairs": {"path": "pairs.jsonl"}, "eval_pairs": {"path": "heldout.jsonl"},
        },
        "sample": {"prompts": "prompts.jsonl", "max_new_tokens": 6},
        "train": {
            "model": "policy", "methods": {"beta_dpo": {"loss": "beta_dpo"}, "madpo": {"loss": "madpo"}},
            "trainer": small | {"learning_rate": 1e-2}, "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        },
        "evaluate": {"prompts": "prompts.jsonl", "max_new_tokens": 6},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def harness(run: Path, kills: int, output: Path, *more: str) -> dict[str, object]:
    """What the script finds; it must find nothing wrong."""
    command = [sys.executable, "-m", "scripts.kill.run", str(run), "--kills", str(kills), *more]
    done = subprocess.run(
        [*command, "--output", str(output)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())  # type: ignore[no-any-return]


def test_three_kills(tmp_path: Path) -> None:
    found = harness(workspace(tmp_path), 3, tmp_path / "kills.json")
    assert found["kills"] == 3 and found["differences"] == [] and found["stages_repeated"] == []


@pytest.mark.slow
def test_twenty_five_kills(tmp_path: Path) -> None:
    """Every stage is hit, some of them while files are being written."""
    output = ROOT / "build" / "kill_anywhere.json"
    output.parent.mkdir(exist_ok=True)
    found = harness(workspace(tmp_path), 25, output, "--every-stage")
    assert int(found["kills"]) >= 25 and found["differences"] == [] and found["stages_repeated"] == []  # type: ignore[call-overload]
    hit = found["hit"]
    assert isinstance(hit, dict) and all(count > 0 for stage, count in hit.items() if stage != "start"), hit
    assert int(found["as_a_file_appeared"]) > 5  # type: ignore[call-overload]
