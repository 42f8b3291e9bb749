"""Small tables and servers for the tests of the viewer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from starlette.testclient import TestClient

from align.viewer.server import make_app
from align.viewer.session import Options, Session
from align.viewer.sources import SourceTable, open_table

TOKEN, PORT = "token-of-the-tests", 8123


def frame(rows: int, seed: int = 0) -> pd.DataFrame:
    """A table of pairs with numbers, missing values, ties and names."""
    draw = np.random.default_rng(seed)
    margin = np.round(draw.normal(0.5, 1, rows), 1)
    margin[draw.random(rows) < 0.1] = np.nan
    words = np.array(["alpha", "Beta", "gamma", "delta", "50%", "a_b", "back\\slash", "ümlaut"])
    texts = [" ".join(draw.choice(words, 4)) for _ in range(3 * rows)]
    return pd.DataFrame(
        {
            "id": [f"p{k}" for k in range(rows)],
            "prompt": texts[:rows],
            "chosen": [f"{text} yes" for text in texts[rows : 2 * rows]],
            "rejected": [f"{text} no" for text in texts[2 * rows :]],
            "group": draw.choice(["a", "b", "c'; drop table pairs; --"], rows, p=[0.6, 0.3, 0.1]),
            "margin": margin,
            "votes_chosen": draw.integers(0, 6, rows),
            "quality": draw.exponential(1, rows),
            "kept": draw.random(rows) < 0.5,
        }
    )


def write(table: pd.DataFrame, file: Path, group: int = 7) -> Path:
    """The table as Parquet, in small row groups."""
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), file, row_group_size=group)
    return file


@contextmanager
def client(*given: Any, runs: tuple[Path, ...] = (), **options: Any) -> Iterator[TestClient]:
    """A client of a server over files or tables; ``scratch`` next to the first one holds the caches."""
    scratch = options.pop("scratch")
    scratch.mkdir(exist_ok=True)
    tables = [one if isinstance(one, SourceTable) else open_table(str(one), {}, "train", scratch) for one in given]
    session = Session(tables, runs, scratch, Options(**({"who": "ann", "text_cache": False} | options)))
    try:
        with TestClient(make_app(session, TOKEN, PORT), base_url=f"http://127.0.0.1:{PORT}") as made:
            made.headers["x-token"] = TOKEN
            yield made
    finally:
        session.close()


def wait_for_cache(asked: TestClient) -> None:
    """Return once the text cache is there."""
    end = time.monotonic() + 60
    while (state := asked.get("/api/state").json()["cache"])["state"] == "building":
        assert time.monotonic() < end, state
        time.sleep(0.05)
    assert state["state"] == "ready", state


def rows_of(asked: TestClient, query: dict[str, Any]) -> list[int]:
    """The row numbers of a query, all of them."""
    found = asked.post("/api/view", json={"query": query}).json()
    got: list[int] = []
    while len(got) < found["count"]:
        got += asked.get("/api/rows", params={"view": found["view"], "start": len(got), "count": 400}).json()["rows"]
    return got


def decide(asked: TestClient, row: int, action: str, value: Any = None, name: str | None = None) -> dict[str, Any]:
    """Decide about a row as the page does: look at it, then send what is decided; the pair afterwards."""
    before = asked.get("/api/pair", params={"row": row}).json()
    one = {"id": name or f"decision-{time.monotonic_ns()}", "row": row, "action": action, "value": value,
           "base": before["heads"]}  # fmt: skip
    done = asked.post("/api/decide", json={"decisions": [one]})
    assert done.status_code == 200, done.text
    return asked.get("/api/pair", params={"row": row}).json()
