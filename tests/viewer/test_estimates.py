"""What the judged pairs say, against worlds whose flips and margins are planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit
from starlette.testclient import TestClient

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.stats import share_interval
from align.viewer.person_trust import FEWEST, log_likelihood, person_trust
from tests.viewer.helpers import client, frame, rows_of, write

ROWS = 400


def world(seed: int = 3) -> tuple[pd.DataFrame, np.ndarray]:
    """A table with cross-fitted margins, and whether the label of each pair is wrong: often in source b."""
    draw = np.random.default_rng(seed)
    table = frame(ROWS, seed)
    table["group"] = draw.choice(["a", "b"], ROWS, p=[0.75, 0.25])
    wrong = draw.random(ROWS) < np.where(table["group"] == "b", 0.5, 0.05)
    table["margin"] = np.where(wrong, -1, 1) * draw.normal(1.0, 1.0, ROWS)
    table["margin_source"] = "cross-fitted"
    return table, wrong


def judge(asked: TestClient, rows: list[int], wrong: np.ndarray, other: dict[int, str] | None = None) -> None:
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        sent = [
            {"id": f"judged-{row:06}", "row": row, "base": [],
             "action": (other or {}).get(row) or ("flip" if wrong[row] else "keep")}
            for row in part
        ]  # fmt: skip
        assert asked.post("/api/decide", json={"decisions": sent}).status_code == 200


def test_the_estimates_are_those_of_the_judged_beginning_of_the_random_queue(tmp_path: Path) -> None:
    table, wrong = world()
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s") as asked:
        queue = rows_of(asked, {"queue": "random"})
        found = asked.get("/api/estimates").json()
        assert (found["judged"], found["next"], found["flips"], found["trust"]) == (0, 50, None, None)
        judge(asked, queue[:60], wrong, {queue[7]: "tie", queue[8]: "drop"})
        judge(asked, queue[70:90], wrong)
        found = asked.get("/api/estimates").json()
        assert (found["judged"], found["not_counted"], found["undecided"], found["next"]) == (60, 20, 2, 100)
        clear = [row for row in queue[:60] if row not in (queue[7], queue[8])]
        assert found["flips"] == share_interval(wrong[clear].astype(float)).to_dict()
        for name in "ab":
            own = [row for row in clear if table["group"][row] == name]
            assert found["sources"][name] == share_interval(wrong[own].astype(float)).to_dict()
        right = (table["margin"][clear] > 0) != wrong[clear]
        accuracy = found["accuracy"]
        assert accuracy["value"] == pytest.approx(right.mean()) and accuracy["fair"] and accuracy["column"] == "margin"
        judge(asked, queue[60:70], wrong)
        assert asked.get("/api/estimates").json()["judged"] == 90, "the gap is closed, so the rest counts"


def test_intervals_of_the_flip_rate_hold_the_truth(tmp_path: Path) -> None:
    """The random queue is an honest sample: over worlds, its 95% intervals hold the true share of the whole table."""
    held = 0
    for seed in range(8):
        table, wrong = world(seed)
        table["id"] = [f"{seed}-{k}" for k in range(ROWS)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        with client(write(table, folder / "t.parquet", 200), scratch=folder / "s") as asked:
            judge(asked, rows_of(asked, {"queue": "random"})[:50], wrong)
            flips = asked.get("/api/estimates").json()["flips"]
        held += flips["low"] <= wrong.mean() <= flips["high"]
    assert held >= 7


@pytest.mark.parametrize(("source", "fair"), [("in-sample", False), (None, False), ("outside", True)])
def test_margins_that_learned_the_labels_are_no_judges(tmp_path: Path, source: str | None, fair: bool) -> None:
    table, wrong = world()
    table = table.assign(margin_source=source) if source else table.drop(columns="margin_source")
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s") as asked:
        judge(asked, rows_of(asked, {"queue": "random"})[:60], wrong)
        found = asked.get("/api/estimates").json()
        assert found["accuracy"]["fair"] == fair
        assert (found["trust"]["value"] is not None) == fair


def test_the_trust_is_the_maximum_of_its_likelihood() -> None:
    draw = np.random.default_rng(0)
    margins = draw.normal(0.5, 1.5, 150)
    for true in (0.2, 0.6, 1.0):
        flipped = draw.random(150) < true * expit(-1.3 * margins)

        def negative(trust: float, flipped: np.ndarray = flipped) -> float:
            chance = (1 - trust) + trust * expit(1.3 * margins)
            return float(-np.log(np.where(flipped, 1 - chance, chance)).sum())

        found = minimize_scalar(negative, bounds=(1e-6, 1), method="bounded")
        grid = log_likelihood(margins, flipped, 1.3)
        assert np.linspace(0, 1, 101)[grid.argmax()] == pytest.approx(found.x, abs=0.011)
        assert grid.max() == pytest.approx(-found.fun, abs=0.05)


def test_the_interval_of_the_trust_holds_it() -> None:
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        every = draw.normal(0.7, 1.5, 4000)
        labels = draw.random(4000) < expit(1.1 * every)
        shown = np.where(labels, every, -every)
        margins = shown[:150]
        from align.trust.slope import calibrated_slope

        flipped = draw.random(150) < 0.5 * expit(-calibrated_slope(shown) * margins)
        found = person_trust(margins, flipped, shown)
        held += found["low"] <= 0.5 <= found["high"]
    assert held >= 34


def test_little_or_one_sided_evidence_gives_a_reason_in_place_of_a_number() -> None:
    few = person_trust(np.ones(FEWEST - 1), np.zeros(FEWEST - 1, bool), np.array([1.0, -1.0]))
    assert few["value"] is None and str(FEWEST) in few["text"]
    positive = person_trust(np.ones(60), np.zeros(60, bool), np.ones(100))
    assert positive["value"] is None and "below 0" in positive["text"]
    against = person_trust(np.ones(60), np.zeros(60, bool), -np.ones(100))
    assert against["value"] is None and "trust 0" in against["text"]
    right = person_trust(np.ones(60), np.zeros(60, bool), np.array([2.0, 1.0, -0.5]))
    assert right["value"] == right["low"] == 0.0, "no label is wrong: the label is believed"


def test_pairs_judged_with_other_texts_are_counted_apart(tmp_path: Path) -> None:
    table, wrong = world()
    file = write(table, tmp_path / "t.parquet")
    with client(file, scratch=tmp_path / "s") as asked:
        queue = rows_of(asked, {"queue": "random"})
        judge(asked, queue[:60], wrong)
        table.loc[queue[10], "chosen"] = "another text"
        write(table, file)
        asked.post("/api/reopen")
        found = asked.get("/api/estimates").json()
        assert (found["judged"], found["not_counted"], found["other_texts"]) == (10, 49, 1)


def test_the_checked_pairs_are_those_that_the_person_decided(tmp_path: Path) -> None:
    table, wrong = world()
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s") as asked:
        refused = asked.post("/api/export", json={"what": "checked"})
        assert refused.status_code == 400 and "no pair" in refused.json()["error"]["message"]
        judge(asked, list(range(40)), wrong, {3: "tie", 4: "drop"})
        found = asked.post("/api/export", json={"what": "checked"}).json()
    assert found["pairs"] == 38 and str(tmp_path / "checked.parquet") in found["config"]
    checked: Any = load_pairs(PairsSection(path=found["path"]), carry=True).to_pandas()
    rows = [row for row in range(40) if row not in (3, 4)]
    assert list(checked["id"]) == [f"p{row}" for row in rows]
    for row, one in zip(rows, checked.itertuples(), strict=True):
        texts = (table["chosen"][row], table["rejected"][row])
        assert (one.chosen, one.rejected) == (texts[::-1] if wrong[row] else texts)
        assert one.checked_label == ("flip" if wrong[row] else "keep")
