"""Malformed inputs: exit 2, one message with cause and place, no traceback, earlier results unchanged."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.bad_input_cases import cases
from tests.helpers.bad_input_makers import BadInput, build_and_run, message, run_command, snapshot
from tests.helpers.bad_inputs import DOCUMENT, END, START, row

CASES = [case for _, case in cases()]
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
WORDED_BY = ("transformers", "trl", "peft", "datasets", "pyarrow", "pandas", "pydantic", "safetensors")


def documented_versions() -> bool:
    """Whether the libraries have the versions of the document, because they word parts of the messages."""
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").split())
    return all(version(name) == pinned[name] for name in WORDED_BY)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pairs, a run file and its finished run."""
    return build_and_run(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_each_is_one_message(workspace: Path, tmp_path: Path, case: BadInput) -> None:
    folder = tmp_path / "w"
    shutil.copytree(workspace, folder)
    case.change(folder)
    before = snapshot(folder / "runs")
    code, output, errors = run_command(case.command, folder)
    told = message(errors)
    assert code == 2, errors
    assert told.startswith(f"error [{case.code}] ") and case.part in told
    assert "Traceback" not in errors + output and errors.count("error [") == 1
    assert len(told) < 3000 and before == snapshot(folder / "runs")
    assert not list(folder.rglob("EXECUTED"))
    if documented_versions():
        assert row(case, told) in DOCUMENT.read_text(encoding="utf-8"), "run `python -m tests.helpers.bad_inputs`"


def test_the_document_shows_these_cases_and_no_others() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text[text.index(START) : text.index(END)]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")]
    assert [name for name in shown if name != "input"] == [case.what for case in CASES]
    assert len({case.what for case in CASES}) == len(CASES) >= 60
    known = text[: text.index(START)]
    assert not [case.code for case in CASES if f"`{case.code}`" not in known]


@pytest.mark.parametrize("what", ["a Parquet file cut off", "an anchor bomb (a billion laughs)", "pickled weights"])
def test_a_new_process_prints_the_same(workspace: Path, tmp_path: Path, what: str) -> None:
    (case,) = [case for case in CASES if case.what == what]
    folder = tmp_path / "w"
    shutil.copytree(workspace, folder)
    case.change(folder)
    command = [sys.executable, "-m", "align.cli", *case.command]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2 and case.part in done.stderr and "Traceback" not in done.stderr
