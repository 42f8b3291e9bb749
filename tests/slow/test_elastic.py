"""torchrun restarts a training by itself after a process or a machine is lost, and the training resumes."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.interrupted import DIES_IN, MODULE, STEPS, difference, prepare, run_file, taken, to_die
from tests.helpers.launching import environment, launched

pytestmark = pytest.mark.slow
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TOLERANCE = 1e-5


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until something listens there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")


def torchrun(port: int, processes: int, file: str) -> list[str]:
    """Command of one of at most two machines, with this many processes."""
    options = ["--nnodes=1:2", "--max-restarts=3", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run", "--rdzv-conf=last_call_timeout=5"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", MODULE, "run", file]


def finished(folder: Path, file: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A run by one torchrun with two processes."""
    full = environment() | more
    line = torchrun(free_port(), 2, file)
    return subprocess.run(line, cwd=folder, env=full, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(("rank", "step"), [(1, DIES_IN), (0, 2)])
def test_a_killed_process(tmp_path: Path, rank: int, step: int) -> None:
    """Another pair of processes goes on from the last checkpoint and ends in the same weights, bit for bit."""
    prepare(tmp_path)
    whole = finished(tmp_path, run_file(tmp_path, "whole"), **OWN_STORE)
    assert whole.returncode == 0, whole.stderr
    steps = taken(tmp_path)
    file = run_file(tmp_path, "killed")
    to_die(tmp_path, rank=rank, step=step)
    killed = finished(tmp_path, file, **OWN_STORE)
    assert killed.returncode == 0, killed.stderr
    assert f"failed (exitcode: -9) local_rank: {rank}" in killed.stderr
    assert f"resuming from runs/killed/train-dpo.partial/checkpoints/checkpoint-{step - 1}" in killed.stderr
    assert taken(tmp_path) == steps and len(steps) == STEPS
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed") == 0


def test_without_a_store_of_its_own_the_restart_says_so(tmp_path: Path) -> None:
    """gloo would look for the processes that were killed, for half an hour."""
    prepare(tmp_path)
    file = run_file(tmp_path, "killed")
    to_die(tmp_path, rank=1)
    killed = finished(tmp_path, file)
    assert killed.returncode != 0
    assert "error [restart-store]" in killed.stderr, killed.stderr
    again = finished(tmp_path, file)
    assert again.returncode == 0 and f"checkpoint-{DIES_IN - 1}" in again.stderr, again.stderr


@pytest.fixture
def machines() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers that a test has started; what is left of them ends with it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for launcher in started:
        launcher.terminate()
        launcher.communicate(timeout=60)


def test_one_of_two_machines_is_gone(tmp_path: Path, machines: list[subprocess.Popen[str]]) -> None:
    """A launcher and its process are killed; the other goes on alone, with the pairs that a step had before."""
    prepare(tmp_path)
    alone = launched(1, "run", run_file(tmp_path, "whole"), cwd=tmp_path, module=MODULE)
    assert alone.returncode == 0, alone.stderr
    steps = taken(tmp_path)
    port = free_port()
    line = torchrun(port, 1, run_file(tmp_path, "lost"))
    to_die(tmp_path, rank=1, agent=True)
    full = environment() | OWN_STORE
    for number in range(2):
        with (tmp_path / f"machine-{number}.txt").open("w") as log:
            machines.append(subprocess.Popen(line, cwd=tmp_path, env=full, stderr=log, text=True))
        wait_for(port)  # the first machine keeps the list of machines
    codes = {launcher.wait(timeout=300) for launcher in machines}
    said = "".join((tmp_path / f"machine-{number}.txt").read_text() for number in range(2))
    assert codes == {0, -9}, said
    assert f"resuming from runs/lost/train-dpo.partial/checkpoints/checkpoint-{DIES_IN - 1}" in said
    lost = taken(tmp_path)
    assert [lost[step][0] for step in sorted(lost)] == [2] * (DIES_IN - 1) + [1] * (STEPS - DIES_IN + 1)
    assert {step: pairs for step, (_, pairs) in lost.items()} == {step: pairs for step, (_, pairs) in steps.items()}
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "lost") < TOLERANCE
