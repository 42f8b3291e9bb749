"""`align view` itself: a server of its own that is asked over HTTP, stopped, killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from align.commands.view import SCRATCH, listening, opened
from align.errors import AlignError, EnvironmentProblem
from tests.helpers.command_line import align
from tests.viewer.helpers import frame, write


@contextmanager
def viewer(*given: str, cwd: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str], str]]:
    """A running `align view`: a client with its token, its process, its address."""
    command = [sys.executable, "-m", "align.cli", "view", *given, "--no-browser", "--who", "ann"]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address, _, token = process.stdout.readline().strip().partition("/#")
        with httpx.Client(base_url=address, headers={"x-token": token}, timeout=60) as client:
            yield client, process, address
    finally:
        process.kill()
        process.communicate()


def events(client: httpx.Client, **params: str) -> Iterator[tuple[str, dict]]:
    with client.stream("GET", "/api/events", params=params) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


def one(number: int, base: list[str] | None = None) -> dict:
    return {"decisions": [{"id": f"decision-{number}", "row": number, "action": "flip", "base": base or []}]}


def test_decisions_outlive_a_killed_server_and_other_tabs_hear_of_them(tmp_path: Path) -> None:
    write(frame(30), tmp_path / "t.parquet")
    run = tmp_path / "demo"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with viewer("t.parquet", "demo", cwd=tmp_path) as (client, process, address):
        assert httpx.get(address).headers["content-security-policy"] and "127.0.0.1" in address
        assert httpx.get(f"{address}/api/open", headers={"x-token": "old"}).status_code == 401
        assert client.get("/api/open").json()["who"] == "ann"
        heard = events(client, table="0", runs="0")
        first = dict([next(heard), next(heard)])
        assert first["state"]["decisions"] == 0 and first["run"]["stages"] == []
        for number in range(3):
            assert client.post("/api/decide", json=one(number)).status_code == 200
        assert next(state for name, state in heard if name == "state" and state["decisions"])["decisions"] in (1, 2, 3)
        partial = run / "train-dpo.partial"
        partial.mkdir()
        (partial / "live.jsonl").write_text(json.dumps({"loss": 0.5, "step": 1, "of": 9, "at": 0.0}) + "\n")
        grown = next(state for name, state in heard if name == "run")
        assert grown["methods"]["dpo"]["curves"]["loss"] == [[1, 0.5]]
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = list(Path(tempfile.gettempdir()).glob(f"{SCRATCH}{process.pid}-*"))
    assert left, "a killed viewer could not remove its caches"
    with viewer("t.parquet", cwd=tmp_path) as (client, process, _):
        states = [client.get(f"/api/pair?row={row}").json()["state"]["label"] for row in range(4)]
        assert states == ["flip", "flip", "flip", None]
        assert client.post("/api/decide", json=one(2)).status_code == 200, "sent again, counts as done"
        assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 3
        assert not any(folder.exists() for folder in left), "the next viewer has removed them"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert not list(Path(tempfile.gettempdir()).glob(f"{SCRATCH}{process.pid}-*"))


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match="cannot be used") as found, listening(port):
            pass
        assert found.value.code == "view-port"
        write(frame(3), tmp_path / "t.parquet")
        done = align("view", "t.parquet", "--port", str(port), "--no-browser", cwd=tmp_path)
        assert done.returncode == 2 and "[view-port]" in done.stderr and "Traceback" not in done.stderr
    with listening(0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "data-missing"), ("", "data-empty"), ('{"prompt": "x"}\n', "data"), ('{"a": 1}\n', "data"),
        ("[1, 2", "data"),
    ],
)  # fmt: skip
def test_what_is_no_pair_table_is_refused(tmp_path: Path, content: str | None, code: str) -> None:
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(AlignError) as found, opened(
        [str(tmp_path / "t.jsonl")], who="ann", decisions=None, columns={}, split="train", text_cache=False
    ):  # fmt: skip
        pass
    assert found.value.code.startswith(code) and "t.jsonl" in found.value.message


def test_other_columns_are_mapped_and_invalid_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"question": f"q{k}", "good": f"a{k}", "bad": f"b{k}"} for k in range(5)] + [{"question": "q", "good": "a"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    with opened(
        [str(tmp_path / "t.jsonl")], who="ann", decisions=None, columns=columns, split="train", text_cache=False
    ) as session:
        table = session.table(0)
        assert table.table.count == 5 and any("1 rows are no valid pairs" in note for note in table.table.notes)
        assert table.pair(2)["plain"] == {"prompt": "q2", "chosen": "a2", "rejected": "b2"}


def test_a_table_of_a_stage_keeps_its_decisions_outside_of_it(tmp_path: Path) -> None:
    """A stage that runs again replaces its folder."""
    stage = tmp_path / "demo" / "crossfit"
    (stage / "pairs").mkdir(parents=True)
    (stage / "manifest.json").write_text(json.dumps({"stage": "crossfit", "seconds": 1}))
    write(frame(3), stage / "pairs" / "pairs.parquet")
    for given in (stage / "pairs" / "pairs.parquet", stage / "pairs", tmp_path / "demo"):
        with opened([str(given)], who="a", decisions=None, columns={}, split="train", text_cache=False) as session:
            assert session.table(0).file.path.resolve() == tmp_path / "demo" / "decisions.jsonl"


def test_the_packages_of_the_extra_are_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['duckdb'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = align("view", "t.parquet", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2 and "[view-extra]" in done.stderr and "margin-align[view]" in done.stderr


def test_a_folder_of_measurements_belongs_to_every_table_given(tmp_path: Path) -> None:
    table = frame(6)
    write(table, tmp_path / "t.parquet")
    (tmp_path / "why").mkdir()
    measured = table[["id", "prompt"]].assign(influence=range(6))
    write(measured, tmp_path / "why" / "influence.parquet")
    given = [str(tmp_path / name) for name in ("why", "t.parquet")]
    with opened(given, who="a", decisions=None, columns={}, split="train", text_cache=False) as session:
        assert len(session.tables) == 1
        assert [session.table(0).cell(row, "influence") for row in range(6)] == list(range(6))
    with pytest.raises(AlignError, match="no pairs"), opened(
        given[:1], who="a", decisions=None, columns={}, split="train", text_cache=False
    ):  # fmt: skip
        pass
