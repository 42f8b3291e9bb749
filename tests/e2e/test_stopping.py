"""A signal in the middle of training: a checkpoint, one line, and the same weights in the end."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from align.data.pairs import write_pairs
from tests.helpers.builders import causal, rows
from tests.helpers.launching import command, environment


def start(folder: Path, name: str, processes: int) -> subprocess.Popen[str]:
    align = command(processes, "align.cli", "train", "run.yaml", "--set", f"name={name}")
    return subprocess.Popen(align, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "code", "word", "processes", "steps"),
    [
        (signal.SIGTERM, 143, "terminated", 1, 400),
        (signal.SIGINT, 130, "stopped", 1, 400),
        (signal.SIGTERM, 143, "terminated", 2, 200),
        pytest.param(signal.SIGINT, 130, "stopped", 2, 200, marks=pytest.mark.slow),
    ],
)
def test_stopped_training_ends_as_if_it_had_not(
    tmp_path: Path, number: int, code: int, word: str, processes: int, steps: int
) -> None:
    """Several processes get the signal from their launcher, which ends with an exit code and last words of its own."""
    causal(tmp_path / "policy")
    write_pairs(Dataset.from_list(rows(16)), tmp_path)
    trainer = {"max_steps": steps, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    run = {
        "name": "x", "pairs": {"path": "pairs.parquet"},
        "train": {"model": "policy", "methods": {"madpo": {"loss": "madpo"}}, "trainer": trainer},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    whole = start(tmp_path, "whole", processes)
    assert whole.wait(timeout=300) == 0
    stopped = start(tmp_path, "stopped", processes)
    lines = []
    assert stopped.stderr is not None
    for line in stopped.stderr:
        lines.append(line)
        if f"{steps} steps" in line:
            time.sleep(0.3)
            stopped.send_signal(number)
    ended = stopped.wait(timeout=300)
    if processes == 1:
        assert ended == code, "".join(lines)
        assert lines[-1].startswith(word) and "Traceback" not in "".join(lines)
    assert ended != 0 and sum(line.startswith(f"{word};") for line in lines) == processes, "".join(lines)
    partial = tmp_path / "runs" / "stopped" / "train-madpo.partial" / "checkpoints"
    (checkpoint,) = partial.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < steps
    again = start(tmp_path, "stopped", processes)
    assert again.stderr is not None
    said = again.stderr.read()
    assert again.wait(timeout=300) == 0, said
    assert "resuming from" in said and checkpoint.name in said
    one, other = (
        load_file(tmp_path / "runs" / n / "train-madpo" / "model" / "model.safetensors") for n in ("whole", "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
