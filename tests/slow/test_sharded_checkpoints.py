"""FSDP2 with sharded checkpoints: each process writes its part, a killed training goes on, the model is saved whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.interrupted import DIES_IN, STEPS, difference, largest_difference, prepare, run_file, taken, to_die
from tests.launching import ROOT, environment, launched

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
MODULE = "tests.dying_fsdp_cli"


def launcher(folder: Path) -> Path:
    """configs/accelerate/nodes.yaml on one machine."""
    tree = yaml.safe_load((ROOT / "configs" / "accelerate" / "nodes.yaml").read_text())
    assert tree["fsdp_config"]["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    file = folder / "launcher.yaml"
    file.write_text(yaml.safe_dump(tree | {"num_machines": 1, "main_process_ip": "localhost"}))
    return file


def test_a_killed_training(tmp_path: Path) -> None:
    prepare(tmp_path)
    alone = launched(1, "run", run_file(tmp_path, "alone"), cwd=tmp_path, module="tests.dying_once_cli")
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
    refused = launched(1, "run", file, cwd=tmp_path, module="tests.dying_once_cli")
    assert refused.returncode == 2 and "error [sharded-checkpoint]" in refused.stderr, refused.stderr
    again = launched(2, "run", file, cwd=tmp_path, module=MODULE, launcher=config)
    assert again.returncode == 0, again.stderr
    assert f"checkpoint-{DIES_IN - 1}" in again.stderr
    taken(tmp_path)
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed") == 0


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    """The parts are dealt out anew."""
    prepare(tmp_path)
    alone = launched(1, "run", run_file(tmp_path, "alone"), cwd=tmp_path, module="tests.dying_once_cli")
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
