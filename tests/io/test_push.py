"""Folders that are copied to an object store: complete, or not looking complete; resumed after a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from align.commands import push
from tests.helpers.bad_input_makers import run_command
from tests.helpers.store_server import FAULT, SEEN, Fault
from tests.helpers.stores import SCORE, names, requests, stored, told, write


@pytest.fixture
def folder(workspace: Path) -> Path:
    """Results of a stage, and leftovers of another one that was stopped."""
    made = workspace / "made"
    (made / "inner").mkdir(parents=True)
    (made / "old.partial").mkdir()
    (made / "old.partial" / "half").write_text("half")
    (made / "a.parquet").write_bytes((workspace / "pairs.parquet").read_bytes())
    (made / "manifest.json").write_text("{}")
    (made / "inner" / "manifest.json").write_text("{}")
    (made / "inner" / "table.jsonl").write_bytes(b'{"prompt": "x"}\n' * 100_000)
    (made / "inner" / "empty").touch()
    return made


ALL = ["a.parquet", "inner/empty", "inner/manifest.json", "inner/table.jsonl", "manifest.json", "pushed.json"]
PUSH = ("push", "made", "s3://bucket/there")


def complete(store: fs.FileSystem) -> bool:
    return bool(json.loads(stored(store, "there/pushed.json"))["complete"])


def test_a_pushed_folder_is_complete_and_unchanged_files_are_not_copied_again(
    store: fs.FileSystem, workspace: Path, folder: Path
) -> None:
    assert "5 files copied" in run_command(PUSH, workspace)[2]
    assert names(store, "there") == [f"there/{name}" for name in ALL] and complete(store)
    for name in ALL[:-1]:
        assert stored(store, f"there/{name}") == (folder / name).read_bytes()
    assert "up to date" in run_command(PUSH, workspace)[2]
    (folder / "inner" / "empty").write_text("no more")
    (folder / "a.parquet").unlink()
    assert "3 files copied, 1 were there" in run_command(PUSH, workspace)[2]
    assert names(store, "there") == [f"there/{name}" for name in ALL[1:]]
    assert stored(store, "there/inner/empty") == b"no more"


def test_a_part_of_an_unfinished_push_is_refused_too(store: fs.FileSystem, workspace: Path, folder: Path) -> None:
    assert run_command(PUSH, workspace)[0] == 0
    inside = ("data", "check", "s3://bucket/there/inner/table.jsonl", "--column", "chosen=prompt")
    assert "a push into it has not ended" not in run_command(inside, workspace)[2]
    write(store, "there/pushed.json", b'{"complete": false}')
    for source in ("inner/table.jsonl", "inner/*.jsonl", "inner/"):
        code, _, errors = run_command(("data", "check", f"s3://bucket/there/{source}"), workspace)
        assert code == 2 and "store-unfinished" in errors and "a push into it has not ended" in errors


def test_other_objects_are_left_alone(store: fs.FileSystem, workspace: Path, folder: Path) -> None:
    write(store, "there/mine", b"mine")
    assert "found other objects there (mine)" in told(PUSH, workspace)
    assert names(store) == ["there/mine"]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("push", "nowhere", "s3://bucket/x"), "data-missing"),
        (("push", "made/old.partial", "s3://bucket/x"), "data-empty"),
        (("push", "made", "elsewhere"), "store-address"),
        (("push", "made", "s3://nowhere/x"), "data-missing"),
    ],
)
def test_a_push_that_cannot_be(
    store: fs.FileSystem, workspace: Path, folder: Path, command: tuple[str, ...], code: str
) -> None:
    (folder / "old.partial" / "half").replace(folder / "old.partial" / "half.tmp")
    assert told(command, workspace).startswith(f"error [{code}] ") and names(store) == []


@pytest.mark.parametrize(
    ("status", "code"), [("507 Insufficient Storage", "InsufficientStorage"), ("503 Slow Down", "SlowDown")]
)
def test_a_store_that_fails_half_way_is_one_message_and_the_next_push_resumes(
    store: fs.FileSystem, server: Path, workspace: Path, folder: Path, status: str, code: str
) -> None:
    Fault("PUT", "table.jsonl", status, code).write(server)
    assert told(PUSH, workspace).startswith("error [store-away] s3://bucket/there: ")
    left = names(store, "there")
    assert "there/a.parquet" in left and not complete(store)
    assert not [name for name in left if name.endswith(("manifest.json", "table.jsonl"))]
    assert "a push into it has not ended" in told(("reward", "score", "s3://bucket/there/", *SCORE), workspace)
    (server / FAULT).unlink()
    assert run_command(PUSH, workspace)[0] == 0 and complete(store)
    assert names(store, "there") == [f"there/{name}" for name in ALL]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_upload_killed_in_the_middle_leaves_nothing_that_looks_complete(
    store: fs.FileSystem, server: Path, workspace: Path, folder: Path, number: signal.Signals
) -> None:
    assert run_command(PUSH, workspace)[0] == 0
    before = (folder / "inner" / "table.jsonl").read_bytes()
    changed = b'{"prompt": "y"}\n' * 1_000_000  # two parts of an upload
    (folder / "inner" / "table.jsonl").write_bytes(changed)
    Fault("PUT", "table.jsonl?partNumber=2", seconds=1.0).write(server)
    (server / SEEN).write_text("")
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli", *PUSH], cwd=workspace, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    while not any(line.startswith("PUT /bucket/there/inner/table.jsonl?partNumber=2") for line in requests(server)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not complete(store)
    assert not [name for name in names(store, "there") if name.endswith("manifest.json")]
    assert stored(store, "there/inner/table.jsonl") == (before if number == signal.SIGKILL else changed)
    (server / FAULT).unlink()
    assert run_command(PUSH, workspace)[0] == 0 and complete(store)
    assert names(store, "there") == [f"there/{name}" for name in ALL]
    assert stored(store, "there/inner/table.jsonl") == changed


def test_a_file_that_changes_during_a_push_is_removed(
    store: fs.FileSystem, workspace: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = push.hash_file
    monkeypatch.setattr(push, "hash_file", lambda file: "old" if file.name == "table.jsonl" else known(file))
    assert "changed while it was copied" in told(PUSH, workspace)
    assert "there/inner/table.jsonl" not in names(store, "there") and not complete(store)
