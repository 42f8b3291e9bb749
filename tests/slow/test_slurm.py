"""configs/slurm/train.sbatch, with stand-ins for srun and scontrol that start real processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.interrupted import difference, prepare, run_file
from tests.helpers.launching import ROOT, environment

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"
STEPS = 1500


class Job:
    """The script as Slurm starts it, on two nodes with a process each."""

    def __init__(self, folder: Path, file: str, restarts: int = 0, nodes: int = 2) -> None:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        path = os.pathsep.join([str(ROOT / "tests" / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"]])
        full = environment() | {
            "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_RESTART_COUNT": str(restarts), "PROCESSES_PER_NODE": "1", "MIN_NODES": str(nodes), "PORT": str(port),
            "GRACE": "60",
        }  # fmt: skip
        self.log = folder / f"slurm-{file}-{restarts}.txt"
        with self.log.open("w") as stream:
            self.script = subprocess.Popen(
                ["bash", str(SCRIPT), file], cwd=folder, env=full, stdout=stream, stderr=stream, start_new_session=True
            )

    def end(self) -> str:
        """What it logged; it must have ended well."""
        try:
            assert self.script.wait(timeout=300) == 0, self.log.read_text()
        finally:
            if self.script.poll() is None:
                os.killpg(self.script.pid, signal.SIGTERM)
        return self.log.read_text()


def test_a_notice_before_the_time_limit(tmp_path: Path) -> None:
    """SIGUSR1: a checkpoint, the job goes back into the queue, and the next start ends as if nothing had been."""
    prepare(tmp_path)
    fields = {"max_steps": STEPS, "save_strategy": "no"}
    Job(tmp_path, run_file(tmp_path, "whole", **fields)).end()
    assert not (tmp_path / "requeued.txt").exists()
    file = run_file(tmp_path, "noticed", **fields)
    job = Job(tmp_path, file)
    deadline = time.monotonic() + 120
    while f"{STEPS} steps" not in job.log.read_text():
        assert time.monotonic() < deadline and job.script.poll() is None, job.log.read_text()
        time.sleep(0.1)
    time.sleep(0.5)
    job.script.send_signal(signal.SIGUSR1)
    said = job.end()
    assert "notice: a checkpoint" in said and said.count("terminated; what is finished is kept") == 2, said
    assert (tmp_path / "requeued.txt").read_text() == "7\n"
    (checkpoint,) = (tmp_path / "runs" / "noticed" / "train-dpo.partial" / "checkpoints").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < STEPS
    again = Job(tmp_path, file, restarts=1).end()
    assert f"resuming from runs/noticed/train-dpo.partial/checkpoints/{checkpoint.name}" in again, again
    assert (tmp_path / "requeued.txt").read_text() == "7\n"
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "noticed") == 0
