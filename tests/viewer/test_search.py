"""Search as a stream: the hits of a plain scan, in any case or not, under the filters of a query; the newest counts."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from align.viewer import text_cache, texts
from align.viewer.streams import Searches, _hits
from align.viewer.views import read_query
from tests.viewer.helpers import client, frame, rows_of, wait_for_cache, write

ROWS = 150
TABLE = frame(ROWS, 4)
WORDS = ["alpha", "BETA", "gamma yes", "ümlaut", "ÜMLAUT", "%", "_", "\\slash", ".*", "(", "no such", " "]


@pytest.fixture(scope="module", params=[False, True], ids=["files", "cache"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(texts, "BLOCK", 40)
        patched.setattr(text_cache, "BATCH", 40)
        with client(write(TABLE, folder / "t.parquet"), scratch=folder / "s", text_cache=request.param) as made:
            if request.param:
                wait_for_cache(made)
            yield made


def lines(asked: TestClient, query: dict[str, Any]) -> list[dict[str, Any]]:
    answer = asked.post("/api/search", json={"query": query, "tab": "t"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("any_case", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_hits_are_those_of_a_plain_scan(asked: TestClient, word: str, any_case: bool) -> None:
    what = word.lower() if any_case else word
    all_texts = TABLE[["prompt", "chosen", "rejected"]].to_numpy()
    has = np.array([any(what in (text.lower() if any_case else text) for text in row) for row in all_texts])
    inside = (TABLE["quality"] >= 0.5).to_numpy()
    for filters, wanted in (([], has), ([{"column": "quality", "low": 0.5, "high": None}], has & inside)):
        query = {"text": word, "any_case": any_case, "filters": filters}
        found = lines(asked, query)
        assert found[-1] == {"end": True, "hits": int(wanted.sum())}
        assert [row for line in found[:-1] for row in line["rows"]] == list(np.flatnonzero(wanted))
        done = [line["done"] for line in found[:-1]]
        assert done == sorted(done) and done[-1] == ROWS and found[0]["of"] == ROWS
        assert rows_of(asked, query) == list(np.flatnonzero(wanted))


def test_a_newer_search_of_the_tab_ends_the_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "BATCH", 10)
    from align.viewer.session import OpenTable, Options
    from align.viewer.sources import open_table

    source = open_table(str(write(TABLE, tmp_path / "t.parquet")), {}, "train", tmp_path)
    table, searches = OpenTable(source, tmp_path, Options("ann", text_cache=False)), Searches()
    query = read_query({"text": "a"}, table.table)
    older, other = _hits(table, query, searches, "one"), _hits(table, query, searches, "two")
    assert json.loads(next(older))["done"] == 10 and json.loads(next(other))["done"] == 10
    newer = [json.loads(line) for line in _hits(table, query, searches, "one")]
    assert newer[-1]["end"] and json.loads(next(older)) == {"cancelled": True}
    with pytest.raises(StopIteration):
        next(older)
    assert json.loads(list(other)[-1])["end"], "another tab's search goes on"
    table.close()


def test_queries_and_a_search_at_once_do_not_wait_for_each_other_forever(asked: TestClient) -> None:
    done = []

    def work(number: int) -> None:
        for k in range(5):
            query = {"text": f"a{k % 3}" if number % 2 else "", "sort": "margin", "queue": "random" if k % 2 else None}
            done.append(asked.post("/api/view", json={"query": query, "columns": ["margin"]}).status_code)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(timeout=60)
    assert done == [200] * 30


def test_a_file_that_changes_during_a_search_is_said(tmp_path: Path) -> None:
    file = write(TABLE, tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        asked.get("/api/open")
        write(frame(10), file)
        answer = asked.post("/api/search", json={"query": {"text": "alpha"}, "tab": "t"})
        last = json.loads(answer.text.splitlines()[-1])
        assert last["error"]["code"] == "table-changed"


def test_too_little_room_for_the_cache_is_said_and_search_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(texts.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with client(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s", text_cache=True) as asked:
        cache = asked.get("/api/open").json()["cache"]
        assert cache["state"] == "none" and "too little room" in cache["why"]
        assert lines(asked, {"text": "alpha"})[-1]["hits"] > 0


def test_a_cache_that_cannot_be_built_is_said_and_search_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.sys, "executable", "/bin/false")
    with client(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s", text_cache=True) as asked:
        end = time.monotonic() + 30
        while (state := asked.get("/api/state").json()["cache"])["state"] == "building" and time.monotonic() < end:
            time.sleep(0.02)
        assert state["state"] == "none" and "could not be made" in state["why"]
        assert lines(asked, {"text": "alpha"})[-1]["hits"] > 0
