"""Tables in an object store: same results as from a disk, and one message if the store fails."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.prompts import load_prompts
from align.data.streaming import stream_pairs
from align.io.hashing import fingerprint_source
from align.io.secrets import redact_text
from tests.helpers.bad_input_makers import run_command, write_lines
from tests.helpers.builders import rows
from tests.helpers.store_server import KEY, SECRET, SEEN, Fault
from tests.helpers.stores import SCORE, put, requests, told, write


def test_scores_are_those_of_the_local_file_byte_for_byte(store: fs.FileSystem, workspace: Path) -> None:
    put(store, workspace / "pairs.parquet", "one/pairs.parquet")
    for file in (workspace / "parts").iterdir():
        put(store, file, f"parts/{file.name}")
    sources = ["pairs.parquet", "s3://bucket/one/pairs.parquet", "s3://bucket/parts/", "s3://bucket/parts",
               "s3://bucket/parts/*.parquet", "s3://bucket/pa*/part-?.parquet", "parts", "parts/*.parquet"]  # fmt: skip
    made = []
    for source in sources:
        code, _, errors = run_command(("reward", "score", source, *SCORE), workspace)
        assert code == 0, errors
        made.append((workspace / "scored" / "pairs.parquet").read_bytes())
        shutil.rmtree(workspace / "scored")
    assert made == [made[0]] * len(sources)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_lines_are_read_from_a_store_too(store: fs.FileSystem, tmp_path: Path, suffix: str) -> None:
    table = [{**row, "id": f"p{k}"} for k, row in enumerate(rows(5))]
    write_lines(tmp_path / "p.jsonl", *table)
    header = ",".join(table[0])
    lines = [",".join(f'"{value}"' for value in row.values()) for row in table]
    (tmp_path / "p.csv").write_text("\n".join([header, *lines]) + "\n")
    put(store, tmp_path / f"p.{suffix}", f"p.{suffix}")
    local, remote = tmp_path / f"p.{suffix}", f"s3://bucket/p.{suffix}"
    assert load_pairs(PairsSection(path=remote)).to_list() == load_pairs(PairsSection(path=str(local))).to_list()
    assert load_prompts(remote) == load_prompts(str(local)) == [row["prompt"] for row in table]


def test_prompts_come_from_a_store_and_pushed_completions_become_pairs(store: fs.FileSystem, workspace: Path) -> None:
    put(store, workspace / "prompts.jsonl", "prompts.jsonl")
    generate = ("generate", "s3://bucket/prompts.jsonl", "--model", "policy", "--output", "made", "-n", "4",
                "--max-new-tokens", "4")  # fmt: skip
    assert run_command(generate, workspace)[0] == 0
    assert "up to date" in run_command(generate, workspace)[2]
    assert run_command(("push", "made", "s3://bucket/made"), workspace)[0] == 0
    found = []
    for source in ("made", "s3://bucket/made/", "s3://bucket/made/completions.parquet"):
        build = ("pairs", "build", source, "--output", "built", "--reward-model", "backbone", "--mode", "all")
        assert run_command(build, workspace)[0] == 0
        found.append((workspace / "built" / "pairs.parquet").read_bytes())
    assert found == [found[0]] * 3


def test_a_table_is_streamed_and_each_object_read_once(store: fs.FileSystem, server: Path, workspace: Path) -> None:
    for file in (workspace / "parts").iterdir():
        put(store, file, f"parts/{file.name}")
    (server / SEEN).write_text("")
    streamed = stream_pairs(PairsSection(path="s3://bucket/parts/"), workspace / "a.arrow").to_list()
    local = stream_pairs(PairsSection(path=str(workspace / "pairs.parquet")), workspace / "b.arrow").to_list()
    asked = [line for line in requests(server) if line.startswith("GET /bucket/parts/part-1")]
    assert streamed == local and len(asked) < 20, asked


def test_a_row_is_named_by_its_file(store: fs.FileSystem, workspace: Path) -> None:
    good, bad = rows(2), [{**rows(1)[0], "chosen": ""}]
    for name, table in (("a", good), ("b", bad)):
        pq.write_table(pa.Table.from_pylist(table), workspace / f"{name}.parquet")
        put(store, workspace / f"{name}.parquet", f"rows/{name}.parquet")
    said = told(("reward", "score", "s3://bucket/rows/", *SCORE), workspace)
    assert "s3://bucket/rows/b.parquet:row 1:chosen: found empty text" in said


def test_another_object_under_the_name_makes_a_run_stale(store: fs.FileSystem, workspace: Path) -> None:
    table = pq.read_table(workspace / "pairs.parquet")
    for name, order in {"pairs": range(12), "other": reversed(range(12))}.items():
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(table.take(list(order)), workspace / f"{name}.parquet", **plain)
    put(store, workspace / "pairs.parquet", "p/pairs.parquet")
    command = ("run", "run.yaml", "--set", "pairs.path=s3://bucket/p/pairs.parquet")
    assert run_command(command, workspace)[0] == 0
    assert "nothing to do" in run_command(command, workspace)[2]
    put(store, workspace / "pairs.parquet", "p/pairs.parquet")
    assert "nothing to do" in run_command(command, workspace)[2]
    assert (workspace / "other.parquet").stat().st_size == (workspace / "pairs.parquet").stat().st_size
    put(store, workspace / "other.parquet", "p/pairs.parquet")
    assert "pairs: running" in run_command(command, workspace)[2]
    kept = "".join(path.read_text(errors="replace") for path in (workspace / "runs").rglob("*.json"))
    assert SECRET not in kept and KEY not in kept


def test_fingerprints_follow_every_object_of_a_folder(store: fs.FileSystem, workspace: Path) -> None:
    for file in (workspace / "parts").iterdir():
        put(store, file, f"parts/{file.name}")
    seen = [fingerprint_source("s3://bucket/parts/")]
    assert fingerprint_source("s3://bucket/parts/") == seen[0]
    put(store, workspace / "parts" / "part-1.parquet", "parts/part-0.parquet")
    seen.append(fingerprint_source("s3://bucket/parts/"))
    put(store, workspace / "parts" / "part-1.parquet", "parts/part-9.parquet")
    seen.append(fingerprint_source("s3://bucket/parts/"))
    store.delete_file("bucket/parts/part-2.parquet")
    seen.append(fingerprint_source("s3://bucket/parts/"))
    assert len(set(seen)) == 4
    before = fingerprint_source(str(workspace / "parts" / "*.parquet"))
    pq.write_table(pa.table({"prompt": ["x"]}), workspace / "parts" / "part-1.parquet")
    assert fingerprint_source(str(workspace / "parts" / "*.parquet")) != before


Prepare = Callable[[fs.FileSystem, Path, pytest.MonkeyPatch, Path], object]


def truncated(store: fs.FileSystem, workspace: Path, patch: pytest.MonkeyPatch, server: Path) -> None:
    write(store, "p.parquet", (workspace / "pairs.parquet").read_bytes()[:-20])


def other_columns(store: fs.FileSystem, workspace: Path, patch: pytest.MonkeyPatch, server: Path) -> None:
    put(store, workspace / "pairs.parquet", "mixed/a.parquet")
    pq.write_table(pq.read_table(workspace / "pairs.parquet").append_column("reason", [["x"] * 12]),
                   workspace / "b.parquet")  # fmt: skip
    put(store, workspace / "b.parquet", "mixed/b.parquet")


def failing(method: str, status: str, code: str) -> Prepare:
    def prepare(store: fs.FileSystem, workspace: Path, patch: pytest.MonkeyPatch, server: Path) -> None:
        put(store, workspace / "pairs.parquet", "p.parquet")
        Fault(method, "p.parquet", status, code).write(server)

    return prepare


def environment(**variables: str) -> Prepare:
    def prepare(store: fs.FileSystem, workspace: Path, patch: pytest.MonkeyPatch, server: Path) -> None:
        put(store, workspace / "pairs.parquet", "p.parquet")
        for name, value in variables.items():
            patch.setenv(name, value)

    return prepare


def nothing(store: fs.FileSystem, workspace: Path, patch: pytest.MonkeyPatch, server: Path) -> None:
    """The address itself is wrong."""


CASES: dict[str, tuple[Prepare, str, str, str]] = {
    "no bucket": (nothing, "s3://nowhere/p.parquet", "data-missing", "there is no bucket 'nowhere'"),
    "no object": (nothing, "s3://bucket/nowhere.parquet", "data-missing", "the bucket 'bucket' is there"),
    "no folder": (nothing, "s3://bucket/nowhere/", "data-missing", "s3://bucket/nowhere/"),
    "no bucket of a folder": (nothing, "s3://nowhere/parts/", "data-missing", "s3://nowhere/parts/"),
    "no match": (nothing, "s3://bucket/*.parquet", "data-missing", "no file matches"),
    "cut off": (truncated, "s3://bucket/p.parquet", "data-unreadable", "p.parquet: not a readable Parquet file"),
    "columns differ": (other_columns, "s3://bucket/mixed/", "data-column", "b.parquet: found columns that differ"),
    "wrong key": (environment(AWS_ACCESS_KEY_ID="WRONGKEY-0123"), "s3://bucket/p.parquet", "store-denied", "keys"),
    "away": (environment(AWS_ENDPOINT_URL="http://127.0.0.1:9"), "s3://bucket/p.parquet", "store-away", "unreachable"),
    "bad endpoint": (environment(AWS_ENDPOINT_URL="127.0.0.1:9"), "s3://bucket/p.parquet", "store-address", "http://"),
    "overloaded": (failing("GET", "503 Slow Down", "SlowDown"), "s3://bucket/p.parquet", "store-away", "overloaded"),
    "refused": (failing("GET", "403 Forbidden", "AccessDenied"), "s3://bucket/p.parquet", "store-denied", "refuses"),
    "gone meanwhile": (failing("GET", "404 Not Found", "NoSuchKey"), "s3://bucket/p.parquet", "data-missing", "no"),
    "elsewhere": (failing("HEAD", "301 Moved", "x"), "s3://bucket/p.parquet", "store-failed", "set AWS_REGION"),
    "no name": (nothing, "s3:///p.parquet", "store-address", "bucket/key"),
    "key in it": (nothing, f"s3://{KEY}:{SECRET}@bucket/p.parquet", "store-address", "s3://***@bucket/p.parquet"),
    "scheme": (nothing, "https://host/p.parquet", "store-address", "expected s3://, gs://, abfs://"),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_what_a_store_lacks_or_refuses_is_one_message(
    what: str, store: fs.FileSystem, server: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, source, code, said = CASES[what]
    prepare(store, workspace, monkeypatch, server)
    found = told(("reward", "score", source, *SCORE), workspace)
    assert found.startswith(f"error [{code}] ") and said in found and len(found.splitlines()) <= 2, found
    assert "WRONGKEY" not in found and not (workspace / "scored" / "pairs.parquet").exists()


def test_keys_of_the_environment_are_hidden(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a-third-key")
    assert redact_text(f"{KEY} {SECRET} a-third-key") == "*** *** ***"


@pytest.mark.parametrize("source", ["parts", "parts/*.parquet"])
def test_local_parts_make_a_stage_stale(workspace: Path, source: str) -> None:
    command = ("run", "run.yaml", "--set", f"pairs.path={source}")
    assert run_command(command, workspace)[0] == 0
    assert "nothing to do" in run_command(command, workspace)[2]
    (workspace / "parts" / "part-2.parquet").unlink()
    assert "pairs: running" in run_command(command, workspace)[2]


@pytest.mark.parametrize(
    "command",
    [
        ("reward", "score", "pairs.parquet", "--model", "backbone", "--output", "s3://bucket/scored"),
        ("run", "run.yaml", "--set", "output_dir=s3://bucket/runs"),
    ],
)
def test_results_are_not_written_to_an_address(workspace: Path, command: tuple[str, ...]) -> None:
    assert "align push" in told(command, workspace) and not (workspace / "s3:").exists()


# ---- align push
