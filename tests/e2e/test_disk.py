"""A full disk and a read-only one: one clear message, finished stages stay complete, and the run resumes later."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from align.data.pairs import read_pairs
from tests.helpers.builders import causal, rows
from tests.helpers.command_line import align, jsonl
from tests.helpers.disks import mounted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory; mounting it needs the right to do so."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mounted(folder, "size=64m", "-t", "tmpfs", "none"):
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a policy of about a megabyte, pairs and a run file."""
    causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", rows(24))
    trainer = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False,
               "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    content = {
        "name": "x", "output_dir": "disk", "pairs": {"path": "pairs.jsonl"},
        "train": {"model": "policy", "methods": {"madpo": {"loss": "madpo"}}, "trainer": trainer},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.mark.parametrize("kilobytes", [8, 60, 200, pytest.param(400, marks=pytest.mark.slow),
                                       pytest.param(800, marks=pytest.mark.slow)])  # fmt: skip
def test_a_full_disk(run: Path, disk: Path, kilobytes: int) -> None:
    """Whatever is being written when the space ends: pairs, reference log-probs, weights, the optimizer's state."""
    assert mounted(disk, f"remount,size={kilobytes}k")
    failed = align("train", "run.yaml", cwd=run)
    assert failed.returncode == 2, failed.stderr
    assert "error [disk-full]" in failed.stderr and "no space is left on this disk" in failed.stderr
    assert "Traceback" not in failed.stderr
    for manifest in disk.rglob("manifest.json"):
        assert json.loads(manifest.read_text())["key"]
        if manifest.parent.name == "margins":
            assert len(read_pairs(manifest.parent / "pairs")) == 24
    assert mounted(disk, "remount,size=64m")
    again = align("train", "run.yaml", cwd=run)
    assert again.returncode == 0, again.stderr
    whole = align("train", "run.yaml", "--set", "output_dir=elsewhere", cwd=run)
    assert whole.returncode == 0, whole.stderr
    one, two = (run / place / "x" / "train-madpo" / "model" / "model.safetensors" for place in ("disk", "elsewhere"))
    assert one.read_bytes() == two.read_bytes()


def test_a_disk_that_may_not_be_written(run: Path, disk: Path) -> None:
    assert align("train", "run.yaml", cwd=run).returncode == 0
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert mounted(disk, "remount,ro")
    for change in (("name=new",), ("train.methods.madpo.parameters.beta=0.5",)):
        failed = align("train", "run.yaml", "--set", *change, cwd=run)
        assert failed.returncode == 2, failed.stderr
        assert "error [output-folder]" in failed.stderr and "Traceback" not in failed.stderr
    assert before == {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    nothing = align("train", "run.yaml", cwd=run)
    assert nothing.returncode == 0 and "up to date" in nothing.stderr, nothing.stderr
