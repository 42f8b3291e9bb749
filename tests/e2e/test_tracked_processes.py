"""A Python script in two processes: one tracked run, one model card, and the numbers of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
LAUNCHER = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29587"]


def trained(policy: Path, folder: Path, batch: int, *launcher: str) -> list[Path]:
    """Event files of the script's training in this folder."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.helpers.train_and_track", str(policy), str(folder), str(batch)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TENSORBOARD_LOGGING_DIR": str(folder / "events")},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sorted(folder.rglob("events.out.tfevents.*"))


def test_two_processes_write_one_run_and_one_card(tiny_policy: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "one", tmp_path / "two"
    trained(tiny_policy, alone, 4)
    files = trained(tiny_policy, together, 2, *LAUNCHER)
    assert len(files) == 1
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    numbers, expected = (json.loads((folder / "numbers.json").read_text()) for folder in (together, alone))
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(numbers["losses"])
    assert numbers["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert numbers["test"] == pytest.approx(expected["test"], rel=1e-5)
    assert [path.parent for path in together.rglob("README.md")] == [together]
    card = (together / "README.md").read_text()
    assert "madpo" in card and "pairs per step | 4" in card.replace("`", "")
