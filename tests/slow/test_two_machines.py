"""`accelerate launch` on two simulated machines: what they train, and what happens if one is lost."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.interrupted import DIES_IN, MODULE, STEPS, difference, prepare, run_file, taken, to_die
from tests.helpers.launching import ROOT, environment, launched
from tests.helpers.namespaces import ADDRESSES, TwoMachines, two_machines

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
WAIT = 15
"""Seconds of ``ddp_timeout``."""
MARGIN = 30
"""Seconds from the end of a wait to the end of the launcher, on a busy machine."""
MANY = 600
"""Steps of a training in whose middle a cable is pulled."""
PORT = 29531


@pytest.fixture
def machines() -> Iterator[TwoMachines]:
    """Skips where there may be none."""
    try:
        with two_machines() as found:
            yield found
    except PermissionError as reason:
        pytest.skip(f"no network namespaces here: {reason}")


class Launch:
    """The same run started on both machines."""

    def __init__(self, machines: TwoMachines, folder: Path, file: str) -> None:
        self.logs = [folder / f"{file}-{number}.txt" for number in range(2)]
        self.launchers = []
        for number, log in enumerate(self.logs):
            line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
            line += ["--num_processes", "2", "--machine_rank", str(number), "--main_process_ip", ADDRESSES[0]]
            line += ["--main_process_port", str(PORT), "--mixed_precision", "no", "--dynamo_backend", "no"]
            line += ["--rdzv_backend", "static", "-m", MODULE, "run", file]
            with log.open("w") as stream:
                self.launchers.append(
                    subprocess.Popen(
                        machines.on(number, line),
                        cwd=folder,
                        env=environment() | machines.environment(),
                        stdout=stream,
                        stderr=stream,
                    )
                )

    def output(self, machine: int) -> str:
        """Output of a machine's launcher and process."""
        return self.logs[machine].read_text()

    def codes(self, seconds: float) -> list[int]:
        """Exit codes of both launchers, which end within that time."""
        deadline = time.monotonic() + seconds
        return [launcher.wait(timeout=max(0.1, deadline - time.monotonic())) for launcher in self.launchers]

    def end(self) -> None:
        """Kill whatever is left."""
        for launcher in self.launchers:
            launcher.terminate()
            launcher.wait(timeout=60)


def start(machines: TwoMachines, folder: Path, file: str) -> Launch:
    """Start the run on both machines and wait for its end."""
    launch = Launch(machines, folder, file)
    try:
        assert launch.codes(300) == [0, 0], launch.output(0) + launch.output(1)
    finally:
        launch.end()
    return launch


def write_down(what: str, seconds: float) -> None:
    """How long it took until the launchers had ended."""
    output = ROOT / "build" / f"two_machines_{what}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"ddp_timeout": WAIT, "seconds": round(seconds, 1)}) + "\n")


def test_two_machines_and_one_that_is_killed(tmp_path: Path, machines: TwoMachines) -> None:
    """The weights of two processes on one machine; a lost machine ends the run on the other, and both go on later."""
    prepare(tmp_path)
    one = launched(2, "run", run_file(tmp_path, "one"), cwd=tmp_path, module=MODULE)
    assert one.returncode == 0, one.stderr
    steps = taken(tmp_path)
    start(machines, tmp_path, run_file(tmp_path, "two"))
    assert taken(tmp_path) == steps and len(steps) == STEPS
    assert difference(tmp_path / "runs" / "one", tmp_path / "runs" / "two") < TOLERANCE
    file = run_file(tmp_path, "killed")
    to_die(tmp_path, rank=1, agent=True)
    launch = Launch(machines, tmp_path, file)
    try:
        launch.launchers[1].wait(timeout=300)
        begun = time.monotonic()
        assert launch.launchers[0].wait(timeout=MARGIN) != 0
        write_down("killed", time.monotonic() - begun)
    finally:
        launch.end()
    assert "error [process-lost] process 0 of 2" in launch.output(0), launch.output(0)
    again = start(machines, tmp_path, file)
    assert f"checkpoint-{DIES_IN - 1}" in again.output(0)
    assert taken(tmp_path) == steps
    assert difference(tmp_path / "runs" / "two", tmp_path / "runs" / "killed") == 0


def test_a_cable_that_is_pulled(tmp_path: Path, machines: TwoMachines) -> None:
    """Nobody is told; both ends give up after ``ddp_timeout`` and go on when they are started again."""
    prepare(tmp_path)
    long = {"ddp_timeout": WAIT, "max_steps": MANY, "save_steps": 20}
    start(machines, tmp_path, run_file(tmp_path, "whole", **long))
    steps = taken(tmp_path)
    file = run_file(tmp_path, "pulled", **long)
    launch = Launch(machines, tmp_path, file)
    record = tmp_path / "steps.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not record.exists() or len(record.read_text().splitlines()) < 100:
            assert time.monotonic() < deadline, launch.output(0) + launch.output(1)
            time.sleep(0.1)
        machines.take_down(1)
        begun = time.monotonic()
        assert all(launch.codes(WAIT + MARGIN)), launch.output(0) + launch.output(1)
        write_down("pulled", time.monotonic() - begun)
    finally:
        launch.end()
    for number in range(2):
        assert f"error [process-lost] process {number} of 2" in launch.output(number), launch.output(number)
    machines.bring_up(1)
    again = start(machines, tmp_path, file)
    assert "resuming from runs/pulled/train-dpo.partial/checkpoints/checkpoint-" in again.output(0)
    assert taken(tmp_path) == steps and len(steps) == MANY
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "pulled") == 0
