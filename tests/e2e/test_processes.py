"""Two processes give what one gives: same pairs a step, same weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.builders import causal
from tests.builders import rows as pairs
from tests.e2e.test_cli import jsonl


def train(folder: Path, name: str, processes: int) -> dict[str, torch.Tensor]:
    """Weights after training on four pairs a step, split over the processes."""
    trainer: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4 // processes, "bf16": False, "gradient_checkpointing": False,
        "learning_rate": 1e-2, "use_cpu": True, "optim": "sgd",
    }  # fmt: skip
    run = {
        "name": name,
        "pairs": {"path": "pairs.jsonl"},
        "train": {"model": "policy", "methods": {"madpo": {"loss": "madpo"}}, "trainer": trainer},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "29571",
    ]
    command = [*(launcher if processes > 1 else [sys.executable]), "-m", "align.cli", "train", f"{name}.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("first pair as the model sees it") == 1
    return load_file(folder / "runs" / name / "train-madpo" / "model" / "model.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    start = load_file(causal(tmp_path / "policy") / "model.safetensors")
    jsonl(tmp_path / "pairs.jsonl", pairs(16))
    one, two = train(tmp_path, "one", 1), train(tmp_path, "two", 2)
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], start[name]) for name in one if name in start)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name
