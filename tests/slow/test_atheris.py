"""Ten minutes of coverage-guided fuzzing: pair files, run files and overrides give a result or a user error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import environment

SECONDS = {"jsonl": 150, "csv": 120, "parquet": 150, "config": 150, "override": 30}
LEAST_RUNS = 200

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", SECONDS)
def test_nothing_crashes(tmp_path: Path, target: str) -> None:
    pytest.importorskip("atheris")
    fuzz = [sys.executable, "-m", "tests.helpers.fuzzing", target, str(tmp_path), "--seconds", str(SECONDS[target])]
    # started by a shell that stays: the peak memory of a process, which is limited, begins at that of its parent
    command = ["sh", "-c", '"$@"; exit $?', "sh", *fuzz]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=1800
    )
    said = done.stdout[-2000:] + done.stderr[-6000:]
    found = [(path.name, path.read_bytes()) for path in tmp_path.glob("*-*") if path.name.split("-")[0] != "seed"]
    assert done.returncode == 0 and not found, f"{found}\n{said}"
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert runs is not None and int(runs[1]) > LEAST_RUNS, said
