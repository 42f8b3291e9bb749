"""DeepSpeed ZeRO 2 and 3 on two processes, by the recipes: the weights of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.helpers.builders import causal, rows
from tests.helpers.launching import ROOT, launched

pytestmark = pytest.mark.slow
MODULE = "tests.helpers.deepspeed_cli"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def launcher(folder: Path, stage: int) -> Path:
    """The recipe of this stage."""
    tree = yaml.safe_load((ROOT / "configs" / "accelerate" / f"zero{stage}.yaml").read_text())
    assert tree["deepspeed_config"]["zero_stage"] == stage
    tree["deepspeed_config"] |= {"gradient_accumulation_steps": 1}
    file = folder / f"zero{stage}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def run_file(folder: Path, name: str, loss: str, peft: dict[str, Any] | None, *, alone: bool, **more: Any) -> str:
    trainer = more | {
        "num_train_epochs": 2, "per_device_train_batch_size": 8 if alone else 4, "learning_rate": 1e-2,
        "max_length": 64, "use_cpu": alone, "bf16": False, "lr_scheduler_type": "constant", "max_grad_norm": 0.5,
    }  # fmt: skip
    train = {"model": str(folder / "policy"), "methods": {"m": {"loss": loss}}, "trainer": trainer}
    config = {
        "name": name, "output_dir": str(folder / "runs"), "seed": 0, "pairs": {"path": str(folder / "pairs.jsonl")},
        "train": train | ({} if peft is None else {"peft": peft}),
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("loss", "peft"), [("dpo", None), ("madpo", LORA)])
def test_two_processes_end_where_one_ends(stage: int, loss: str, peft: dict[str, Any] | None, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    causal(tmp_path / "policy")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16)))
    alone = launched(1, "train", run_file(tmp_path, "alone", loss, peft, alone=True), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    both = run_file(tmp_path, "both", loss, peft, alone=False)
    done = launched(2, "train", both, cwd=tmp_path, module=MODULE, launcher=launcher(tmp_path, stage), timeout=600)
    assert done.returncode == 0, done.stderr
    divided = [(tmp_path / f"divided-{rank}.txt").read_text() for rank in (0, 1)]
    assert divided == [f"DeepSpeedOptimizerWrapper {stage == 3}"] * 2
    name = "model.safetensors" if peft is None else "adapter_model.safetensors"
    found, expected = (load_file(tmp_path / "runs" / run / "train-m" / "model" / name) for run in ("both", "alone"))
    start = load_file(tmp_path / "policy" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5
    assert peft or max(float((found[key] - start[key]).abs().max()) for key in start) > 1e-3


def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    """Under ZeRO 3 both processes die in the third step; the same command ends where one process ends."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    causal(tmp_path / "policy")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16)))
    alone = launched(1, "train", run_file(tmp_path, "alone", "dpo", None, alone=True), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    both = run_file(tmp_path, "both", "dpo", None, alone=False, save_strategy="steps", save_steps=1)
    (tmp_path / "die-at.txt").write_text("2")
    config = launcher(tmp_path, 3)
    killed = launched(2, "train", both, cwd=tmp_path, module=MODULE, launcher=config, timeout=600)
    assert killed.returncode != 0 and not (tmp_path / "runs" / "both" / "train-m").exists()
    done = launched(2, "train", both, cwd=tmp_path, module=MODULE, launcher=config, timeout=600)
    assert done.returncode == 0 and "checkpoint-2" in done.stderr, done.stderr
    found, expected = (
        load_file(tmp_path / "runs" / run / "train-m" / "model" / "model.safetensors") for run in ("both", "alone")
    )
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5
