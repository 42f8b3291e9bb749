"""FSDP2 with sharded checkpoints: each process writes its part, a killed training goes on, the model is saved whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.interrupted import DIES_IN, STEPS, difference, largest_difference, prepare, run_file, taken, to_die
from tests.helpers.launching import ROOT, environment, launched

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
MODULE = "tests.helpers.dying_fsdp_cli"


def launcher(folder: Path) -> Path:
    """configs/accelerate/nodes.yaml on one machine."""
    tree = yaml.safe_load((ROOT / "configs" / "accelerate" / "nodes.yaml").read_text())
    assert tree["fsdp_config"]["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    file = folder / "launcher.yaml"
    file.write_text(yaml.safe_dump(tree | {"num_machines": 1, "main_process_ip": "localhost"}))
    return file


def test_a_killed_training(tmp_path: Path) -> None:
    prepare(tmp_path)
    alone = launched(1, "run", run_file(tmp_path, "alone"), cwd=tmp_path, module="tests.helpers.dying_once_cli")
    assert alone.returncode == 0, alone.stderr
    config, steps = launcher(tmp_path), taken(tmp_path)
    whole = run_file(tmp_path, "whole", use_cpu=False)
    done = launched(2, "run", whole, cwd=tmp_path, module=MODULE, launcher=config)
    assert done.returncode == 0, done.stderr
    assert {step: pairs for step, (_, pairs) in taken(tmp_path).items()} == {
        k: pairs for k, (_, pairs) in steps.items()
    }
    assert difference(tmp_path / "runs" / "alone", tmp_path / "runs" / "whole") < TOLERANCE
    kept = tmp_path / "runs" / "whole" / "train-dpo" / "checkpoints" / f"checkpoint-{STEPS}"
    assert not list(kept.rglob("optimizer*"))
    merge = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights"]
    merged = tmp_path / "merged"
    subprocess.run([*merge, str(kept / "pytorch_model_fsdp_0"), str(merged)], env=environment(), check=True)
    assert largest_difference(merged, tmp_path / "runs" / "whole" / "train-dpo" / "model") == 0
    file = run_file(tmp_path, "killed", use_cpu=False)
    to_die(tmp_path, rank=1)
    assert launched(2, "run", file, cwd=tmp_path, module=MODULE, launcher=config).returncode != 0
    checkpoint = tmp_path / "runs" / "killed" / "train-dpo.partial" / "checkpoints" / f"checkpoint-{DIES_IN - 1}"
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert len(list((checkpoint / part).glob("*.distcp"))) == 2, list(checkpoint.rglob("*"))
    refused = launched(1, "run", file, cwd=tmp_path, module="tests.helpers.dying_once_cli")
    assert refused.returncode == 2 and "error [sharded-checkpoint]" in refused.stderr, refused.stderr
    again = launched(2, "run", file, cwd=tmp_path, module=MODULE, launcher=config)
    assert again.returncode == 0, again.stderr
    assert f"checkpoint-{DIES_IN - 1}" in again.stderr
    taken(tmp_path)
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed") == 0


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    """The parts are distributed again over the processes."""
    prepare(tmp_path)
    alone = launched(1, "run", run_file(tmp_path, "alone"), cwd=tmp_path, module="tests.helpers.dying_once_cli")
    assert alone.returncode == 0, alone.stderr
    config, steps = launcher(tmp_path), taken(tmp_path)
    file = run_file(tmp_path, "moved", use_cpu=False)
    to_die(tmp_path, rank=1)
    assert launched(before, "run", file, cwd=tmp_path, module=MODULE, launcher=config).returncode != 0
    again = launched(after, "run", file, cwd=tmp_path, module=MODULE, launcher=config)
    assert again.returncode == 0 and f"checkpoint-{DIES_IN - 1}" in again.stderr, again.stderr
    moved = taken(tmp_path)
    assert {step: pairs for step, (_, pairs) in moved.items()} == {step: pairs for step, (_, pairs) in steps.items()}
    assert difference(tmp_path / "runs" / "alone", tmp_path / "runs" / "moved") < TOLERANCE


def exported() -> dict[str, str]:
    """The plain variables that configs/slurm/train.sbatch sets."""
    text = (ROOT / "configs" / "slurm" / "train.sbatch").read_text()
    lines = re.findall(r"^export (.+)$", text, flags=re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\w+)(?:\s|$)", "\n".join(lines)))


def test_torchrun_starts_it_again(tmp_path: Path) -> None:
    """With the variables of the batch script: sharded as by nodes.yaml, restarted after a process was killed."""
    variables = exported()
    assert {"ACCELERATE_USE_FSDP", "FSDP_VERSION", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"} <= variables.keys()
    prepare(tmp_path)
    whole = run_file(tmp_path, "whole", use_cpu=False)
    done = launched(2, "run", whole, cwd=tmp_path, module=MODULE, launcher=launcher(tmp_path))
    assert done.returncode == 0, done.stderr
    counts = tmp_path / "sharded-1.json"
    counts.unlink()
    file = run_file(tmp_path, "killed", use_cpu=False)
    to_die(tmp_path, rank=1)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "--nproc-per-node=2"]
    killed = subprocess.run(
        [*line, "-m", MODULE, "run", file], cwd=tmp_path, env=environment() | variables,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr
    assert f"checkpoint-{DIES_IN - 1}" in killed.stderr
    sharded, trained = json.loads(counts.read_text())
    assert 0 < sharded == trained
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed") == 0


SLOW = "tests.helpers.slow_writes_cli"
"""Checkpoints after steps 3, 6, 9 and 12; only the newest is kept."""


def in_background(folder: Path, name: str) -> str:
    """A run whose parts are written while it goes on."""
    file = folder / run_file(folder, name, use_cpu=False, save_steps=3, save_total_limit=1)
    tree = yaml.safe_load(file.read_text())
    tree["train"]["async_checkpoints"] = True
    file.write_text(yaml.safe_dump(tree))
    return file.name


def disk(folder: Path, **told: float) -> None:
    """See ``tests.helpers.slow_writes_cli``."""
    (folder / "disk.json").write_text(json.dumps({"slow": 0, "seconds": 1} | told))


def test_written_while_the_training_goes_on(tmp_path: Path) -> None:
    """Steps are made meanwhile, and the weights are those without a checkpoint in the background."""
    prepare(tmp_path)
    config = launcher(tmp_path)
    waiting = launched(2, "run", run_file(tmp_path, "waiting", use_cpu=False), cwd=tmp_path, module=MODULE,
                       launcher=config)  # fmt: skip
    assert waiting.returncode == 0, waiting.stderr
    disk(tmp_path)
    done = launched(2, "run", in_background(tmp_path, "whole"), cwd=tmp_path, module=SLOW, launcher=config)
    assert done.returncode == 0, done.stderr
    assert difference(tmp_path / "runs" / "waiting", tmp_path / "runs" / "whole") == 0
    writes = [json.loads(line) for line in (tmp_path / "writes.jsonl").read_text().splitlines()]
    assert sorted((one["rank"], one["checkpoint"]) for one in writes) == [
        (rank, step) for rank in (0, 1) for step in (3, 6, 9, 12) for _ in ("model", "optimizer")
    ]
    assert all(one["written_in"] > one["checkpoint"] for one in writes if one["checkpoint"] == 3), writes
    kept = tmp_path / "runs" / "whole" / "train-dpo" / "checkpoints"
    assert [path.name for path in kept.iterdir()] == [f"checkpoint-{STEPS}"]


def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The one before, which it would have replaced, is still there; the training goes on from it, bit for bit."""
    prepare(tmp_path)
    config, file = launcher(tmp_path), in_background(tmp_path, "killed")
    disk(tmp_path, slow=6, seconds=20)
    to_die(tmp_path, rank=1)
    assert launched(2, "run", file, cwd=tmp_path, module=SLOW, launcher=config).returncode != 0
    assert not (tmp_path / "dies.json").exists()
    disk(tmp_path, seconds=0)
    again = launched(2, "run", file, cwd=tmp_path, module=SLOW, launcher=config)
    assert again.returncode == 0, again.stderr
    assert "checkpoint-6: not written to its end" in again.stderr and "resuming from" in again.stderr
    assert "checkpoint-3\n" in again.stderr
    whole = launched(2, "run", in_background(tmp_path, "whole"), cwd=tmp_path, module=SLOW, launcher=config)
    assert whole.returncode == 0, whole.stderr
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed") == 0


def test_a_disk_that_is_full_meanwhile(tmp_path: Path) -> None:
    prepare(tmp_path)
    config, file = launcher(tmp_path), in_background(tmp_path, "full")
    disk(tmp_path, seconds=0, full=6, rank=1)
    failed = launched(2, "run", file, cwd=tmp_path, module=SLOW, launcher=config)
    assert failed.returncode != 0
    assert "error [disk-full]" in failed.stderr, failed.stderr
    disk(tmp_path, seconds=0)
    again = launched(2, "run", file, cwd=tmp_path, module=SLOW, launcher=config)
    assert again.returncode == 0 and "checkpoint-3\n" in again.stderr, again.stderr
