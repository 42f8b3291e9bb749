"""A run that is killed anywhere ends like an undisturbed one: scripts/kill/run.py on a complete tiny run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT, environment
from tests.helpers.small_runs import every_stage


def harness(run: Path, kills: int, output: Path, *more: str) -> dict[str, object]:
    """Run the script, which must find nothing wrong; returns its JSON."""
    command = [sys.executable, "-m", "scripts.kill.run", str(run), "--kills", str(kills), *more]
    done = subprocess.run(
        [*command, "--output", str(output)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())  # type: ignore[no-any-return]


def test_three_kills(tmp_path: Path) -> None:
    found = harness(every_stage(tmp_path), 3, tmp_path / "kills.json")
    assert found["kills"] == 3 and found["differences"] == [] and found["stages_repeated"] == []


@pytest.mark.slow
def test_twenty_five_kills(tmp_path: Path) -> None:
    """Every stage is hit, some of them while files are being written."""
    output = ROOT / "build" / "kill_anywhere.json"
    output.parent.mkdir(exist_ok=True)
    found = harness(every_stage(tmp_path), 25, output, "--every-stage")
    assert int(found["kills"]) >= 25 and found["differences"] == [] and found["stages_repeated"] == []  # type: ignore[call-overload]
    hit = found["hit"]
    assert isinstance(hit, dict) and all(count > 0 for stage, count in hit.items() if stage != "start"), hit
    assert int(found["as_a_file_appeared"]) > 5  # type: ignore[call-overload]
