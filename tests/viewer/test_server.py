"""What the server answers to whom, and that no text of a table becomes anything else than text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from tests.viewer.helpers import PORT, client, decide, frame, rows_of, wait_for_cache, write

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</textarea><svg onload=alert(1)>", "\u202eabc",
    "مرحبا بالعالم", "a\r\nb\tc", "'; drop table pairs; --", "{{7*7}}", "\\u003cscript\\u003e", "🦆" * 50,
    "null", "[1]",
]  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("server")
    with client(write(frame(20), folder / "t.parquet"), scratch=folder / "s") as made:
        yield made


@pytest.mark.parametrize("token", ["", "x", "Token-of-the-tests", "токен".encode().decode("latin-1")])
def test_data_needs_the_token(asked: TestClient, token: str) -> None:
    for path in ("/api/open", "/api/pair?row=0", "/api/rows", "/api/search", "/api/decide", "/api/events", "/api/none"):
        found = asked.get(path, headers={"x-token": token.encode("latin-1")})
        assert found.status_code == 401 and found.json()["error"]["code"] == "view-token", path
        assert "align view" in found.json()["error"]["hint"]
    assert asked.get("/", headers={"x-token": token.encode("latin-1")}).status_code == 200, "the page has no data in it"


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1:1", f"127.0.0.1.evil:{PORT}", ""])
def test_another_host_is_refused(asked: TestClient, host: str) -> None:
    """A page elsewhere whose name resolves to 127.0.0.1 does not get through."""
    for path in ("/", "/api/open"):
        assert asked.get(path, headers={"host": host}).status_code == 421
    assert asked.get("/api/open", headers={"host": f"localhost:{PORT}"}).status_code == 200


def test_every_answer_has_the_policy(asked: TestClient) -> None:
    paths = ["/", "/api/open", "/none", "/api/none", "/api/pair?row=99", "/report/x", "/static/app.js"]
    for answer in (*map(asked.get, paths), asked.get("/api/open", headers={"x-token": "x"})):
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert policy["connect-src"] == "'self'" and policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["content-type"]


@pytest.mark.parametrize("path", ["/..%2fserver.py", "/vendor/..%2f..%2fserver.py", "//etc/passwd", "/static"])
def test_only_the_files_of_the_page_are_served(asked: TestClient, path: str) -> None:
    assert asked.get(path).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/view", "["), ("/api/view", "[]"), ("/api/view", '"x"'), ("/api/view", "{" * 50_000),
        ("/api/view", '{"query": {"text": "\\ud800"}}'), ("/api/view", '{"query": {}, "columns": "margin"}'),
        ("/api/view", '{"query": {}, "columns": ["group"]}'), ("/api/view", '{"query": {}, "first": 401}'),
        ("/api/view?table=1", '{"query": {}}'), ("/api/view?table=-1", '{"query": {}}'),
        ("/api/search", '{"query": {}}'),
        ("/api/cells", '{"rows": [20]}'), ("/api/cells", '{"rows": [true]}'), ("/api/cells", '{"rows": {"a": 1}}'),
        ("/api/scatter", '{"query": {}, "x": "margin", "y": "group"}'), ("/api/decide", '{"decisions": {}}'),
        ("/api/decide", '{"decisions": []}'),
        ("/api/decide", '{"decisions": [{"row": true, "id": "12345678", "base": []}]}'),
        ("/api/decide", '{"decisions": [{"row": 0, "id": "x", "base": [], "action": "keep"}]}'),
        ("/api/decide", '{"decisions": [{"row": 0, "id": "12345678", "base": 1, "action": "keep"}]}'),
        ("/api/decide", '{"decisions": [{"row": 0, "id": "12345678", "base": [], "action": "explode"}]}'),
        ("/api/decide", '{"decisions": [{"row": 99, "id": "12345678", "base": [], "action": "keep"}]}'),
        ("/api/export", '{"what": "../x"}'),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_by_a_sentence(asked: TestClient, path: str, body: str) -> None:
    found = asked.post(path, content=body)
    assert found.status_code == 400 and found.json()["error"]["message"], found.text
    assert "Traceback" not in found.text


def test_a_body_without_end_is_refused(asked: TestClient) -> None:
    found = asked.post("/api/view", content=b" " * 9_000_000)
    assert found.status_code == 400 and "bytes" in found.json()["error"]["message"]


@pytest.mark.parametrize("cache", [False, True])
def test_texts_come_as_they_are(tmp_path: Path, cache: bool) -> None:
    """In every place where a text is shown, and only in JSON."""
    table = frame(len(HOSTILE))
    table["prompt"], table["chosen"] = HOSTILE, [f"{text} 1" for text in HOSTILE]
    table["group"], table["id"] = HOSTILE, HOSTILE
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s", text_cache=cache) as asked:
        if cache:
            wait_for_cache(asked)
        loaded = asked.get("/api/open").json()["loaded"]
        for row, text in enumerate(HOSTILE):
            answer = asked.get("/api/pair", params={"row": row})
            found = answer.json()
            assert answer.headers["content-type"] == "application/json"
            assert found["values"]["prompt"] == found["plain"]["prompt"] == found["id"] == text
            assert found["cells"]["group"] == text
            assert rows_of(asked, {"filters": [{"column": "group", "names": [text]}]}) == [row]
            assert row in rows_of(asked, {"text": text})
            cells = asked.post("/api/cells", json={"rows": [row]}).json()["cells"][0]
            assert cells[loaded.index("group")] == text
            assert decide(asked, row, "note", text)["state"]["note"] == text
            assert decide(asked, row, "edit", {"rejected": text})["state"]["edits"] == {"rejected": text}
        lines = (tmp_path / "decisions.jsonl").read_text().splitlines()
        assert [json.loads(line)["after"]["note"] for line in lines[::2]] == HOSTILE


def test_messages_and_what_json_has_no_type_for(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<b>hi</b>"}]
    answers = [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    odd = pd.DataFrame(
        {
            "id": ["a", "b"], "prompt": [turns, turns], "chosen": [answers, answers],
            "rejected": [[{"role": "assistant", "content": "y"}], [{"role": "assistant", "content": "z"}]],
            "when": pd.to_datetime(["2020-01-01", None]), "list": [[1.0, float("inf"), float("nan")], None],
            "bytes": [b"\xff", None], "big": [2**62 + 1, 5], "none": [np.nan, np.nan],
        }
    )  # fmt: skip
    with client(write(odd, tmp_path / "t.parquet"), scratch=tmp_path / "s", text_cache=True) as asked:
        before = asked.get("/api/pair", params={"row": 0}).json()
        wait_for_cache(asked)
        found = asked.get("/api/pair", params={"row": 0}).json()
        assert before == found
        assert found["values"]["prompt"] == turns and found["values"]["chosen"] == answers
        assert "tool_calls" in found["plain"]["chosen"]
        assert found["others"]["list"] == [1.0, "inf", None]
        assert found["cells"]["when"].startswith("2020-01-01") and found["cells"]["big"] == str(2**62 + 1)
        rejected = decide(asked, 0, "edit", {"rejected": [{"role": "assistant", "content": "w"}]})
        assert rejected["state"]["edits"]["rejected"][0]["content"] == "w"
        bad = {"id": "12345678", "row": 0, "action": "edit", "value": {"rejected": "text"}, "base": rejected["heads"]}
        assert asked.post("/api/decide", json={"decisions": [bad]}).json()["error"]["code"] == "decision"


def test_a_changed_file_is_said_and_read_again_on_request(tmp_path: Path) -> None:
    file = write(frame(20), tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        decide(asked, 3, "flip")
        head = asked.get("/api/pair", params={"row": 4}).json()["heads"]
        write(frame(25, seed=1), file)
        for path in ("/api/pair?row=0", "/api/state", "/api/estimates"):
            found = asked.get(path)
            assert found.status_code == 409 and found.json()["error"]["code"] == "table-changed", path
        one = {"id": "decision-1", "row": 4, "action": "keep", "base": head}
        assert asked.post("/api/decide", json={"decisions": [one]}).status_code == 409, "not written about another text"
        assert asked.post("/api/reopen").status_code == 200
        assert asked.get("/api/open").json()["count"] == 25
        found = asked.get("/api/pair", params={"row": 3}).json()
        assert found["state"]["label"] == "flip" and found["other_texts"], "the same id, but another text was judged"
        file.unlink()
        assert asked.post("/api/reopen").json()["error"]["code"] == "data-unreadable"


def test_a_cut_off_file_and_a_removed_one(tmp_path: Path) -> None:
    file = write(frame(200), tmp_path / "t.parquet")
    whole = file.read_bytes()
    with client(file, scratch=tmp_path / "s") as asked:
        assert asked.get("/api/open").json()["count"] == 200
        file.write_bytes(whole[: len(whole) // 2])
        assert asked.get("/api/pair", params={"row": 0}).status_code == 409
        assert asked.post("/api/reopen").json()["error"]["code"] == "data-unreadable"
        file.write_bytes(whole)
        assert asked.post("/api/reopen").status_code == 200 and asked.get("/api/open").json()["count"] == 200


def test_the_database_reaches_nothing_else(tmp_path: Path) -> None:
    """Were a query ever not ours: no other file, no network, no extension, and no way back."""
    import duckdb

    from align.viewer.sources import open_table
    from align.viewer.table import PairTable

    file = write(frame(5), tmp_path / "t.parquet")
    table = PairTable(open_table(str(file), {}, "train", tmp_path), tmp_path)
    other = write(frame(5), tmp_path / "other.parquet")
    with table.query() as cursor:
        for query in (
            f"select * from '{other}'", "select * from read_csv('/etc/passwd')", "install httpfs", "load httpfs",
            f"attach '{tmp_path / 'x.db'}'", f"copy pairs to '{tmp_path / 'x.csv'}'",
            "set enable_external_access = true",
            "select * from 'http://127.0.0.1:1/x.parquet'", "pragma create_fts_index('pairs', 'id', 'id')",
        ):  # fmt: skip
            with pytest.raises(duckdb.Error):
                cursor.execute(query)
    table.close()


@pytest.mark.parametrize("content", [{"margin": None}, {"margin": "drop"}])
def test_a_table_without_margins_works_and_says_so(tmp_path: Path, content: dict[str, Any]) -> None:
    table = frame(20)
    table = table.drop(columns="margin") if content["margin"] == "drop" else table.assign(margin=np.nan)
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s") as asked:
        found = asked.get("/api/open").json()
        assert ("margin" in found["queues"]) == (content["margin"] is None)
        if content["margin"] == "drop":
            assert any("margin" in note and "align reward score" in note for note in found["notes"])
            assert asked.post("/api/view", json={"query": {"queue": "margin"}}).status_code == 400
        decide(asked, 0, "keep")
        assert asked.get("/api/estimates").json()["accuracy"] is None


def test_rows_that_share_an_id_cannot_be_decided(tmp_path: Path) -> None:
    table = frame(5)
    table.loc[4, "id"] = "p0"
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s") as asked:
        found = asked.get("/api/open").json()
        assert not found["can_decide"] and any("share" in note or "another row" in note for note in found["notes"])
        one = {"id": "12345678", "row": 0, "action": "keep", "base": []}
        assert asked.post("/api/decide", json={"decisions": [one]}).json()["error"]["code"] == "decision"
    assert not (tmp_path / "decisions.jsonl").exists()
