"""Runs in the viewer: what was measured about their pairs, answers of policies, curves of a training that goes on."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from align.viewer.followed import follow
from align.viewer.neighbors import jaccard, word_set
from align.viewer.sources import is_measurement, is_run, run_tables
from tests.viewer.helpers import client, frame, rows_of, wait_for_cache, write

ROWS = 40


def put(file: Path, value: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def table_at(file: Path, table: pd.DataFrame) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return write(table, file)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with margins of two origins, measurements of entanglement and influence, and samples along a training."""
    folder, draw = tmp_path / "demo", np.random.default_rng(0)
    table = frame(ROWS)
    table["margin"] = draw.normal(0.3, 1, ROWS)
    for stage in ("reward", "crossfit", "margins", "train-dpo"):
        put(folder / stage / "manifest.json", {"stage": stage, "seconds": 1.0})
    table_at(folder / "margins" / "pairs" / "pairs.parquet", table.assign(margin_source="in-sample"))
    shuffled = table.sample(frac=1, random_state=1)
    table_at(folder / "reward" / "in_sample" / "pairs.parquet", shuffled.assign(margin=shuffled["margin"] + 1))
    table_at(folder / "crossfit" / "pairs" / "pairs.parquet", shuffled[:30].assign(margin=shuffled["margin"][:30] - 1))
    for step in (10, 20):
        measured = pd.DataFrame({"id": [f"p{k}" for k in range(10)], "verdict": "both fall", "entangled": True,
                                 "cosine": np.arange(10.0) + step, "ches": 1.0})  # fmt: skip
        table_at(folder / "trace-dpo" / f"step-{step:06d}" / "entanglement.parquet", measured)
    influence = pd.DataFrame({"id": ["p3", "p4"], "influence": [0.5, -0.5], "influence@a": [1.0, 2.0]})
    table_at(folder / "influence" / "influence.parquet", influence)
    return folder


def test_what_was_measured_is_joined_by_id(run: Path) -> None:
    tables = run_tables(run)
    names = [one.name for one in tables]
    assert "demo/margins/pairs" in names and all("checkpoints" not in name for name in names) and is_run(run)
    shown = next(one for one in tables if one.name == "demo/margins/pairs")
    original = pd.read_parquet(shown.files[0]).set_index("id")
    with client(shown, runs=(run,), scratch=run.parent / "s") as asked:
        opened = asked.get("/api/open").json()
        assert len(opened["measurements"]) == 4
        facts = {one["name"]: one for one in opened["columns"]}
        assert facts["cosine"]["missing"] == ROWS - 10 and facts["margin_cross_fitted"]["missing"] == 10
        assert all(facts[name]["meaning"] for name in ("cosine", "verdict", "influence@a", "margin_in_sample"))
        for row in range(ROWS):
            found = asked.get("/api/pair", params={"row": row}).json()
            cells, key = found["cells"], found["id"]
            assert key == f"p{row}", "joining keeps the order of the rows"
            assert cells["margin_in_sample"] == pytest.approx(original.loc[key, "margin"] + 1)
            assert cells["cosine"] == (20.0 + row if row < 10 else None), "of a trace the last checkpoint counts"
            assert cells["influence"] == {3: 0.5, 4: -0.5}.get(row)
            expected = original.loc[key, "margin"] - 1
            assert cells["margin_cross_fitted"] is None or cells["margin_cross_fitted"] == pytest.approx(expected)
        numbers = {one["name"]: one for one in asked.get("/api/pair", params={"row": 3}).json()["numbers"]}
        values = original["quality"].to_numpy()
        own = original.loc["p3", "quality"]
        assert numbers["quality"]["rank"] == pytest.approx(((values < own) + (values == own) / 2).mean())


def test_ready_filters_are_what_they_say(run: Path) -> None:
    shown = next(one for one in run_tables(run) if one.name == "demo/margins/pairs")
    with client(shown, scratch=run.parent / "s") as asked:
        opened = asked.get("/api/open").json()
        ready = {one["name"]: one for one in opened["ready"]}
        cells = asked.post("/api/cells", json={"rows": list(range(ROWS))}).json()["cells"]
        table = pd.DataFrame(cells, columns=opened["loaded"])
        wanted = {
            "reward model against label": table["margin_cross_fitted"] <= 0,
            "learned by heart": (table["margin_in_sample"] >= 0) & (table["margin_cross_fitted"] <= 0),
            "entangled": table["entangled"] == True,  # noqa: E712
            "dropped by the filter": ~table["kept"].astype(bool),
            "in-sample margins": table["margin_source"] == "in-sample",
            "without a margin": table["margin_cross_fitted"].isna(),
        }
        for name, mask in wanted.items():
            assert ready[name]["count"] == mask.sum() > 0, name
            assert rows_of(asked, ready[name]["query"]) == list(np.flatnonzero(mask)), name
        assert ["margin_in_sample", "margin_cross_fitted"] in opened["scatters"]
        queue = rows_of(asked, {"queue": "margin"})
        order = table["margin_cross_fitted"].sort_values(kind="stable", na_position="last").index
        assert queue == list(order), "the fair margins lead, not those that learned the labels"


def test_a_broken_or_doubled_measurement_is_said_and_left_out(run: Path) -> None:
    put(run / "trace-dpo" / "step-000020" / "entanglement.parquet", "no parquet")
    twice = pd.DataFrame({"id": ["p1", "p1"], "influence": [1.0, 2.0]})
    table_at(run / "influence" / "influence.parquet", twice)
    shown = next(one for one in run_tables(run) if one.name == "demo/margins/pairs")
    with client(shown, scratch=run.parent / "s") as asked:
        opened = asked.get("/api/open").json()
        assert "influence" not in opened["loaded"] and any("twice" in note for note in opened["notes"])


def test_tokens_of_a_measurement(run: Path) -> None:
    tokens = [{"text": " the", "value": 0.5, "shade": "up3"}, {"text": "<b>", "value": -1.0, "shade": "dn3"}]
    put(run / "trace-dpo" / "tokens.json", [{"id": "p2", "verdict": "both fall", "cosine": float("nan"),
                                             "norm_ratio": 1.0, "chosen": tokens, "rejected": []}])  # fmt: skip
    shown = next(one for one in run_tables(run) if one.name == "demo/margins/pairs")
    with client(shown, scratch=run.parent / "s") as asked:
        (found,) = asked.get("/api/tokens", params={"row": 2}).json()["measured"]
        assert [one["shade"] for one in found["chosen"]] == [0.5, -1.0] and found["chosen"][1]["text"] == "<b>"
        assert found["verdict"] == "both fall" and found["cosine"] is None
        assert asked.get("/api/tokens", params={"row": 3}).json() == {"measured": []}


def test_folders_of_measurements_are_told_from_tables(run: Path) -> None:
    assert is_measurement(run / "trace-dpo") and not is_measurement(run / "margins" / "pairs")


def test_answers_of_every_policy_over_training(run: Path) -> None:
    prompt = frame(ROWS)["prompt"][5]
    for step, reward in ((0, 0.5), (10, float("nan"))):
        samples = run / "train-dpo" / "held-out" / "samples"
        put(samples / "prompts.json", ["another", prompt])
        row = {"prompt": 1, "sample": 0, "text": f"at {step}", "tokens": 3, "finish_reason": "stop", "kl": 0.1,
               "reward": reward, "ids": [1]}  # fmt: skip
        put(samples / f"step-{step}.jsonl", json.dumps(row) + "\n")
    for policy in ("dpo", "reference"):
        answers = pd.DataFrame({"prompt": [prompt, "x"], "text": [f"by {policy}", None], "tokens": [2, None]})
        table_at(run / f"generate-{policy}" / "completions.parquet", answers)
    shown = next(one for one in run_tables(run) if one.name == "demo/margins/pairs")
    with client(shown, runs=(run,), scratch=run.parent / "s") as asked:
        found = asked.get("/api/answers", params={"row": 5}).json()
        places = [(one["policy"], one["step"], one["text"]) for one in found["answers"]]
        assert places == [("reference", None, "by reference"), ("dpo", 0, "at 0"), ("dpo", 10, "at 10"),
                          ("dpo", None, "by dpo")]  # fmt: skip
        assert [one["reward"] for one in found["answers"]] == [None, 0.5, None, None]
        put(run / "train-dpo" / "held-out" / "samples" / "step-10.jsonl", '{"prompt": 1, "sa')
        assert len(asked.get("/api/answers", params={"row": 5}).json()["answers"]) == 3, "half written"
        assert "no policy" in asked.get("/api/answers", params={"row": 6}).json()["why"]


def test_neighbors_share_most_words_and_copies_all(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    words = [f"w{k}" for k in range(300)]
    table = frame(120)
    table["prompt"] = [" ".join(draw.choice(words, 8)) for _ in range(120)]
    near = table["prompt"][7].split()
    table.loc[50, "prompt"] = " ".join([*near[:6], "other", "words"])
    table.loc[51, "prompt"] = " ".join([*near[:4], "many", "other", "words", "here"])
    table.loc[60, ["prompt", "chosen", "rejected"]] = table.loc[7, ["prompt", "chosen", "rejected"]]
    table.loc[61, ["prompt", "chosen", "rejected"]] = table.loc[7, ["prompt", "rejected", "chosen"]].to_numpy()
    with client(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s", text_cache=True) as asked:
        wait_for_cache(asked)
        found = asked.get("/api/neighbors", params={"row": 7}).json()["neighbors"]
        own = word_set(table["prompt"][7])
        scores = [jaccard(own, word_set(text)) for text in table["prompt"]]
        assert [one["row"] for one in found][:2] == [50, 51]
        assert all(one["similarity"] == scores[one["row"]] for one in found)
        best = sorted((score for row, score in enumerate(scores) if row not in (7, 60, 61)), reverse=True)
        assert [one["similarity"] for one in found] == pytest.approx(best[: len(found)])
        assert asked.get("/api/copies", params={"row": 7}).json() == {"same": [60], "flipped": [61], "prompt": [60, 61]}
        assert asked.get("/api/copies", params={"row": 9}).json() == {"same": [], "flipped": [], "prompt": []}


def live(*steps: tuple[int, float], of: int = 100, pace: float = 2.0) -> str:
    rows = [{"loss": loss, "step": step, "of": of, "at": 1000 + pace * k} for k, (step, loss) in enumerate(steps)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_training_that_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    training = folder / "train-dpo.partial"
    put(training / "live.jsonl", live((10, 0.7), (20, 0.6), (30, 0.5)) + '{"loss": 0.')
    estimate = {"value": 0.65, "low": 0.6, "high": 0.7, "n": 5}
    record = {"step": 20, "pairs": {"choosing": {"loss": estimate}, "all": {"loss": estimate}}}
    put(training / "held-out" / "step-20.json", record | {"samples": {"all": {"reward": estimate, "kl": None}}})
    put(training / "held-out" / "step-30.json", '{"step": 3')
    put(training / "entanglement.json", [{"step": 10, "entangled": 0.25, "seconds": 1.0}])
    found = follow(folder)
    assert [(one["name"], one["finished"]) for one in found["stages"]] == [("train-dpo", False)]
    method = found["methods"]["dpo"]
    assert method["curves"]["loss"] == [[10, 0.7], [20, 0.6], [30, 0.5]]
    assert method["curves"]["held-out all loss"] == [[20, 0.65]] and method["bands"]["held-out all loss"] == [
        [20, 0.6, 0.7]
    ]
    assert method["curves"]["samples all reward"] == [[20, 0.65]]
    assert method["curves"]["entanglement entangled"] == [[10, 0.25]]
    assert (method["step"], method["of"]) == (30, 100)
    assert method["seconds_left"] == pytest.approx(70 * 4 / 20) and method["silent"] is None
    for seconds, minutes in ((200, None), (400, 6)):
        written = time.time() - seconds
        os.utime(training / "live.jsonl", (written, written))
        assert follow(folder)["methods"]["dpo"]["silent"] == minutes
    assert method["groups"][0] == {"title": "Loss", "curves": ["loss", "held-out all loss"]}
    assert sorted(name for one in method["groups"] for name in one["curves"]) == sorted(method["curves"])


def test_a_resumed_training_takes_its_later_steps_back(tmp_path: Path) -> None:
    put(tmp_path / "train-dpo.partial" / "live.jsonl", live((10, 0.7), (20, 0.6), (30, 0.5)) + live((20, 0.55)))
    with (tmp_path / "train-dpo.partial" / "live.jsonl").open("a") as stream:
        stream.write(json.dumps({"eval_loss": 0.9, "step": 20, "of": 100, "at": 3000}) + "\n")
    assert follow(tmp_path)["methods"]["dpo"]["curves"]["eval_loss"] == [[20, 0.9]]
    assert follow(tmp_path)["methods"]["dpo"]["curves"]["loss"] == [[10, 0.7], [20, 0.55]]


@pytest.mark.parametrize(
    "content", ["", "null", "[1]", '{"history": [3, {"step": "x"}, {"step": 1, "loss": "y"}]}', "\x00"]
)
def test_odd_files_of_a_run_are_no_curves(tmp_path: Path, content: str) -> None:
    for name in ("history.json", "live.jsonl", "held-out/step-1.json", "entanglement.json", "manifest.json"):
        put(tmp_path / "train-dpo" / name, content)
    put(tmp_path / "train-dpo" / "manifest.json", {"seconds": 1})
    found = follow(tmp_path)
    assert found["methods"]["dpo"]["curves"] == {} and found["report"] is False
    assert follow(tmp_path / "missing")["stages"] == []


def test_a_run_without_pairs_yet_is_followed_and_its_tables_appear(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    put(run / "run.json", {})
    with client(runs=(run,), scratch=tmp_path / "s") as asked:
        opened = asked.get("/api/open").json()
        assert opened["tables"] == [] and opened["count"] == 0
        assert (
            asked.get("/api/pair", params={"row": 0})
            .json()["error"]["message"]
            .endswith("no stage has written pairs yet")
        )
        assert asked.get("/api/run").json()["name"] == "demo"
        table_at(run / "margins" / "pairs" / "pairs.parquet", frame(5))
        assert asked.get("/api/open").json()["count"] == 5


def test_the_report_of_a_run_is_shown_in_a_sandbox(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    put(run / "run.json", {})
    with client(runs=(run,), scratch=tmp_path / "s") as asked:
        assert asked.post("/api/ticket").json() == {"address": None}
        put(run / "report.html", "<script>1</script>")
        address = asked.post("/api/ticket").json()["address"]
        shown = asked.get(address, headers={"x-token": ""})
        assert shown.text == "<script>1</script>"
        policy = shown.headers["content-security-policy"]
        assert policy.startswith("sandbox allow-scripts;") and "allow-same-origin" not in policy
        assert "default-src 'none'" in policy and "connect-src" not in policy
        assert asked.get("/report/other").status_code == 404
        (run / "report.html").unlink()
        gone = asked.get(address)
        assert gone.status_code == 500 and "Traceback" not in gone.text
