"""Queries of the page against the same computed in pandas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.viewer.helpers import client, frame, rows_of, wait_for_cache, write

ROWS = 157
TABLE = frame(ROWS)
NUMBERS = ["margin", "votes_chosen", "quality"]
ENDS = st.one_of(st.none(), st.floats(-3, 6, width=16))


@pytest.fixture(scope="module", params=[False, True], ids=["files", "cache"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server that reads texts from the file, and one that has copied them."""
    folder = tmp_path_factory.mktemp("table")
    with client(write(TABLE, folder / "t.parquet"), scratch=folder / "s", text_cache=request.param) as made:
        if request.param:
            wait_for_cache(made)
        yield made


def passing(query: dict[str, Any], without: str | None = None) -> np.ndarray:
    """Whether each row passes, by pandas."""
    found = np.ones(ROWS, dtype=bool)
    for one in query.get("filters", []):
        values = TABLE[one["column"]]
        if one["column"] == without:
            continue
        if one.get("missing"):
            found &= values.isna().to_numpy()
        elif "names" in one:
            found &= values.map(str).isin(one["names"]).to_numpy()
        else:
            found &= (one["low"] is None) | (values >= (one["low"] or 0)).to_numpy()
            found &= (one["high"] is None) | (values <= (one["high"] or 0)).to_numpy()
    if query.get("text"):
        found &= TABLE[["prompt", "chosen", "rejected"]].apply(
            lambda row: any(
                query["text"].lower() in text.lower() if query.get("any_case") else query["text"] in text
                for text in row
            ),
            axis=1,
        )
    return np.asarray(found)


def query_strategy() -> st.SearchStrategy[dict[str, Any]]:
    ranges = st.builds(
        lambda c, low, high: {"column": c, "low": low, "high": high}, st.sampled_from(NUMBERS), ENDS, ENDS
    )
    names = st.builds(
        lambda names: {"column": "group", "names": names},
        st.lists(st.sampled_from(["a", "c'; drop table pairs; --", "z"])),
    )
    return st.fixed_dictionaries(
        {
            "filters": st.lists(st.one_of(ranges, names, st.just({"column": "margin", "missing": True})), max_size=3),
            "sort": st.sampled_from([None, "margin", "votes_chosen", "id", "kept"]),
            "descending": st.booleans(),
            "text": st.sampled_from(["", "alpha", "BETA", "%", "a_b", "\\s", "ümlaut y", "'", ".*"]),
            "any_case": st.booleans(),
        }
    )


@given(query=query_strategy())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_and_histograms_are_those_of_pandas(asked: TestClient, query: dict[str, Any]) -> None:
    wanted = TABLE[passing(query)]
    if query["sort"] is not None:
        wanted = wanted.sort_values(query["sort"], ascending=not query["descending"], kind="stable", na_position="last")
    assert rows_of(asked, query) == list(wanted.index)
    columns = {one["name"]: one for one in asked.get("/api/open").json()["columns"]}
    found = asked.post("/api/view", json={"query": query, "columns": NUMBERS}).json()
    for name, counts in found["histograms"].items():
        values, facts = TABLE[name][passing(query, without=name)].to_numpy(dtype=float), columns[name]
        there = values[~np.isnan(values)]
        edges = np.linspace(facts["low"], facts["high"], facts["bins"] + 1)
        assert sum(counts) == len(values) and counts[-1] == np.isnan(values).sum()
        assert counts[0] == (there < facts["low"]).sum() and counts[-2] == (there > facts["high"]).sum()
        for k, edge in enumerate(edges[1:-1], 1):  # rounding may move a value on an edge by one bin
            near = np.isclose(there, edge).sum()
            assert abs(sum(counts[: k + 1]) - (there < edge).sum()) <= near


def test_a_scatter_counts_every_row_once(asked: TestClient) -> None:
    query = {"filters": [{"column": "quality", "low": 0.2, "high": None}]}
    found = asked.post("/api/scatter", json={"query": query, "x": "margin", "y": "votes_chosen"}).json()
    both = TABLE[passing(query)][["margin", "votes_chosen"]].dropna()
    assert sum(count for *_, count in found["cells"]) == len(both)
    assert found["outside"] == passing(query).sum() - len(both)
    lowest = min(found["cells"], key=lambda cell: cell[0])[0]
    assert lowest == 0 or both["margin"].min() > TABLE["margin"].min()


def test_cells_come_in_the_order_of_the_view(asked: TestClient) -> None:
    view = asked.post("/api/view", json={"query": {"sort": "quality", "descending": True}}).json()["view"]
    got = asked.get("/api/rows", params={"view": view, "start": 5, "count": 9}).json()
    wanted = TABLE.sort_values("quality", ascending=False).iloc[5:14]
    loaded = asked.get("/api/open").json()["loaded"]
    assert got["rows"] == list(wanted.index)
    assert [row[loaded.index("id")] for row in got["cells"]] == list(wanted["id"])
    assert [row[loaded.index("quality")] for row in got["cells"]] == pytest.approx(list(wanted["quality"]))


def test_one_pair_has_its_texts_and_numbers(asked: TestClient) -> None:
    for row in (0, 6, 7, ROWS - 1):
        found = asked.get("/api/pair", params={"row": row}).json()
        assert found["values"] == {name: TABLE[name][row] for name in ("prompt", "chosen", "rejected")}
        margin = TABLE["margin"][row]
        assert found["cells"]["margin"] == (None if np.isnan(margin) else margin)


def test_the_random_queue_is_proportional_in_every_beginning(asked: TestClient) -> None:
    order = rows_of(asked, {"queue": "random"})
    assert sorted(order) == list(range(ROWS)) and order != sorted(order)
    shares = TABLE["group"].value_counts(normalize=True)
    for count in (20, 50, 100, ROWS):
        drawn = TABLE["group"][order[:count]].value_counts()
        assert all(abs(drawn.get(name, 0) - share * count) <= 1.5 for name, share in shares.items())
    lowest = rows_of(asked, {"queue": "margin", "filters": [{"column": "margin", "low": None, "high": 0.0}]})
    assert list(TABLE["margin"][lowest]) == sorted(TABLE["margin"][TABLE["margin"] <= 0])


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "margin; drop table pairs"}, {"sort": "prompt"}, {"filters": [{"column": "none", "low": 0}]},
        {"filters": [{"column": "margin", "low": "0) or (1=1"}]}, {"filters": [{"column": "group", "low": 1}]},
        {"filters": {"column": "margin"}}, {"text": 3}, {"queue": "all"}, {"filters": [{"column": ["margin"]}]},
        {"filters": [{"column": "margin", "low": True}]}, {"decided": "yes"}, [], "x",
        {"filters": [{"column": "group", "names": [1]}]}, {"sort": ["margin"]},
    ],
)  # fmt: skip
def test_what_is_no_query_is_refused(asked: TestClient, query: Any) -> None:
    found = asked.post("/api/view", json={"query": query})
    assert found.status_code == 400 and found.json()["error"]["code"] == "view-query"


def test_odd_columns_are_shown_and_do_not_mix(tmp_path: Path) -> None:
    """Names that differ by case alone, the database's own names, quotes, lists, infinity, one value, none."""
    odd = pd.DataFrame(
        {
            "id": ["x", "y", "z"], "prompt": ["p"] * 3, "chosen": ["c"] * 3, "rejected": ["r"] * 3,
            "Margin": [9.0, 8.0, 7.0], "margin": [1.0, 2.0, 3.0], "rowid": [5, 6, 7], 'q"uote': [1.5, np.inf, -np.inf],
            "list": [[1, 2], [], None], "none": [None] * 3, "long": ["x" * 300, "y", "z"], "one": [4, 4, 4],
        }
    )  # fmt: skip
    with client(write(odd, tmp_path / "[odd] k=1.parquet"), scratch=tmp_path / "s") as asked:
        facts = {one["name"]: one for one in asked.get("/api/open").json()["columns"]}
        assert {name for name, one in facts.items() if one["kind"] == "long"} == {
            "Margin", "margin", "rowid", "list", "long"
        }  # fmt: skip
        pair = asked.get("/api/pair", params={"row": 1}).json()
        assert pair["others"]["margin"] == 2.0 and pair["others"]["Margin"] == 8.0 and pair["others"]["rowid"] == 6
        assert pair["cells"]['q"uote'] == "inf"
        found = asked.post("/api/view", json={"query": {"sort": 'q"uote'}, "columns": ['q"uote', "one"]}).json()
        assert sum(found["histograms"]['q"uote']) == 3 and max(found["histograms"]["one"]) == 3
