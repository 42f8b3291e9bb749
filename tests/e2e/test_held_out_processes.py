"""Held-out numbers, samples and the kept step do not depend on how many processes train, nor on sharding."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from align.io.files import read_json
from tests.helpers.builders import causal, rows
from tests.helpers.command_line import jsonl
from tests.helpers.launching import ROOT, launched

SHARDED = ROOT / "configs" / "accelerate" / "fsdp2.yaml"


def held_out(folder: Path, name: str, processes: int, launcher: Path | None = None) -> dict[str, Any]:
    """Train two methods, and return what their histories say about held-out pairs and samples."""
    trainer = {"bf16": False, "max_steps": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 4 // processes,
               "eval_steps": 2, "gradient_checkpointing": False}  # fmt: skip
    samples = None if launcher else {"every": 3, "n": 2, "max_new_tokens": 8}
    train = {"model": "policy", "methods": {"dpo": {"loss": "dpo"}, "beta": {"loss": "beta_dpo"}}, "pairs_per_step": 4,
             "eval_pairs": {"share": 0.34}, "eval_samples": samples, "keep": {"rule": "held_out_loss"},
             "trainer": trainer}  # fmt: skip
    run = {"name": name, "pairs": {"path": "pairs.jsonl"}, "train": train}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    module = "tests.helpers.fsdp_cli" if launcher else "align.cli"
    done = launched(processes, "train", f"{name}.yaml", cwd=folder, module=module, launcher=launcher, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        method: read_json(folder / "runs" / name / f"train-{method}" / "history.json")["held_out"]
        for method in train["methods"]
    }


@pytest.mark.slow
def test_one_and_several_processes(tmp_path: Path) -> None:
    """Pairs to float32, samples to the text; where the model is sharded there is no KL."""
    causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", rows(25))
    one = held_out(tmp_path, "one", 1)
    two = held_out(tmp_path, "two", 2)
    sharded = held_out(tmp_path, "sharded", 2, SHARDED)
    for method, found in one.items():
        for other in (two[method], sharded[method]):
            assert other["kept"]["step"] == found["kept"]["step"]
            steps = {step["step"]: step["pairs"]["all"] for step in found["steps"]}
            for step in other["steps"]:
                metrics = step["pairs"]["all"]
                assert ("kl" in metrics) == (other is two[method])
                expected = {name: steps[step["step"]][name]["value"] for name in metrics}
                assert {name: one["value"] for name, one in metrics.items()} == pytest.approx(expected, abs=2e-4)
        texts = [
            (tmp_path / "runs" / name / f"train-{method}" / "held-out" / "samples" / "step-6.jsonl").read_text()
            for name in ("one", "two")
        ]
        assert [line.split(', "tokens"')[0] for line in texts[0].splitlines()] == [
            line.split(', "tokens"')[0] for line in texts[1].splitlines()
        ]
