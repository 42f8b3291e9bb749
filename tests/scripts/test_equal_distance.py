"""The study at equal distance: its label draws, its interpolation, its differences, and a complete tiny run."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp, ttest_ind

from align.data.pairs import read_pairs
from align.io.files import read_json
from scripts.reproduce import distance
from scripts.reproduce.equal_distance.design import ARMS, BLOCKS, FIRST_SEED, PILOT_SEED, places
from scripts.reproduce.equal_distance.report import by_seed, difference, gain_at, interval, p_value, summarize
from scripts.reproduce.policy_protocol.data import label
from tests.helpers.builders import bert_reward, causal
from tests.helpers.snippets import snippets


def test_the_two_label_draws_err_on_opposite_pairs() -> None:
    """Each draw follows Bradley-Terry; where one takes the less likely response, the other takes the likelier."""
    gap = np.linspace(-2, 2, 4001)
    texts = [f"{k}" for k in range(len(gap))]
    both = [
        label(texts, ["x"] * len(gap), ["y"] * len(gap), gap, scale=1.0, seed=3, antithetic=twin)
        for twin in (False, True)
    ]
    first = np.array([[row == "x" for row in table["chosen"]] for table in both])
    expected = 1 / (1 + np.exp(-gap))
    assert np.abs(first.mean(axis=1) - expected.mean()).max() < 0.02
    for near in (gap < -1, np.abs(gap) < 0.5, gap > 1):
        assert np.abs(first[:, near].mean(axis=1) - expected[near].mean()).max() < 0.05
    likelier = gap > 0
    assert ((first[0] == likelier) | (first[1] == likelier)).all(), "both draws against the odds"
    alone = first - expected
    assert np.corrcoef(alone)[0, 1] < -0.4


def cell(method: str, seed: int, twin: str, slope: float, far: float = 1.5) -> dict[str, Any]:
    """A path on which the gain is ``slope`` times sqrt(2 KL), judged at three marks."""
    marks = []
    for share in (0.25, 0.5, 1.0):
        kl = (far * share) ** 2
        marks.append({"step": int(64 * share), "kl": [kl] * 4, "reward": [0.5 + slope * np.sqrt(2 * kl)] * 4})
    return {"method": method, "seed": seed, "twin": twin, "block": seed % BLOCKS, "marks": marks}


REFERENCE = dict.fromkeys(range(BLOCKS), [0.5] * 4)


def test_gain_at_a_distance_is_that_of_the_path() -> None:
    """Gains that are linear in sqrt(KL) are found exactly, before the first mark too; nothing beyond the last one."""
    path = cell("dpo", 10, "a", 0.3)
    for target in (0.01, 0.3, 1.0, 2.25):
        assert gain_at(path, [0.5] * 4, target) == pytest.approx(0.3 * np.sqrt(2 * target))
    assert gain_at(path, [0.5] * 4, 2.26) is None
    half = by_seed([cell("dpo", 10, "a", 0.2), cell("dpo", 10, "b", 0.4)], REFERENCE, 1.0)
    assert half == {"dpo": {10: pytest.approx(0.3 * np.sqrt(2))}}
    assert by_seed([cell("dpo", 10, "a", 0.2), cell("dpo", 10, "b", 0.4, far=0.5)], REFERENCE, 1.0) == {"dpo": {}}


def test_differences_are_students_and_welchs() -> None:
    rng = np.random.default_rng(0)
    own, base = rng.normal(1, 1, 6), rng.normal(0, 2, 10)
    seeds = [dict(enumerate(values.tolist())) for values in (own, base)]
    paired, apart = (difference(*seeds, paired=one) for one in (True, False))
    assert paired is not None and apart is not None
    assert p_value(paired) == pytest.approx(ttest_1samp(own - base[:6], 0).pvalue)
    welch = ttest_ind(own, base, equal_var=False)
    assert p_value(apart) == pytest.approx(welch.pvalue)
    low, high = welch.confidence_interval(0.95)
    found = interval(apart, 6)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert difference({0: 1.0}, seeds[1], paired=True) is None and difference({}, seeds[1], paired=False) is None


def test_a_planted_difference_is_found_at_equal_distance_though_one_method_goes_further() -> None:
    """MADPO goes twice as far at DPO's slope, so it is level at KL 1; soft labels have a better slope."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.01, 64)
    cells = []
    for number, place in enumerate(places(("dpo", "madpo", "mmpo"))):
        slope, far = {"dpo": (0.2, 1.1), "madpo": (0.2, 2.2), "mmpo": (0.3, 2.0)}[place.method]
        cells.append(cell(place.method, place.seed, place.twin, slope + noise[number], far))
    rows = {(row["kl"], row["method"]): row for row in summarize(cells, REFERENCE)}
    level, ahead = rows[1.0, "madpo"], rows[1.0, "mmpo"]
    assert level["over_dpo"]["low"] < 0 < level["over_dpo"]["high"] and abs(level["over_dpo"]["value"]) < 0.03
    assert ahead["over_dpo"]["low"] < 0.1 * np.sqrt(2) < ahead["over_dpo"]["high"] and ahead["p"] < 0.001
    assert rows[3.0, "dpo"]["reached"] == 0 and rows[3.0, "madpo"]["over_dpo"] is None
    assert rows[3.0, "madpo"]["reached"] == 6 and rows[1.0, "trust"]["seeds"] == 0


def test_the_cells_of_the_design() -> None:
    """Every method on the seeds and draws that the design counts, no seed of an earlier study, seed by seed."""
    found = list(places())
    assert len(found) == len(set(found)) == 20 + 12 + 8 + 8 + 6 + 6
    assert min(place.seed for place in found) == FIRST_SEED > PILOT_SEED
    assert [place.seed for place in found] == sorted(place.seed for place in found)
    assert {place.twin for place in found if not ARMS[place.method].reads_labels} == {"a"}


def test_a_complete_tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Cells of every method; the twins' labels differ; no table unasked; nothing is computed twice."""
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    config = {
        "name": "tiny",
        "reward": {"model": str(bert_reward(tmp_path / "backbone")), "folds": 2, "trainer": small, "max_length": 64,
                   "pairs": {"path": "unused.jsonl"}},
        "sample": {"prompts": "unused.jsonl", "max_new_tokens": 6},
        "train": {"model": str(causal(tmp_path / "policy")), "methods": {"dpo": {"loss": "dpo"}},
                  "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "trainer": small},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(tmp_path / "run.yaml"), "--snippets", str(snippets(tmp_path / "snippets"))]
    options += ["--train-prompts", "12", "--seen-prompts", "0", "--block", "3", "--reward-pairs", "4", "--seeds", "1"]
    options += ["--marks", "1", "2", "--learning-rate", "0.05", "--output", str(tmp_path / "out")]
    options += ["--methods", "dpo", "mmpo", "relabelled", "--set", "train.trainer.bf16=false"]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["distance", *options, *more])
        distance.main()
        return str(capsys.readouterr().out)

    assert "| dpo |" not in run()
    root = tmp_path / "out"
    cells = [json.loads(line) for line in (root / "cells.jsonl").read_text().splitlines()][BLOCKS:]
    assert [(one["method"], one["twin"]) for one in cells] == [
        ("dpo", "a"), ("dpo", "b"), ("mmpo", "a"), ("relabelled", "a")
    ]  # fmt: skip
    for one in cells:
        assert [mark["step"] for mark in one["marks"]] == [1, 2] and min(one["marks"][1]["kl"]) >= 0
        assert len(one["marks"][0]["text"]) == len(one["marks"][0]["reward"]) == 3 and one["reward_model"] == 1
    draws = [read_pairs(root / f"seed-10/pairs-{twin}/pairs").to_list() for twin in "ab"]
    assert [row["prompt"] for row in draws[0]] == [row["prompt"] for row in draws[1]]
    assert [row["chosen"] for row in draws[0]] != [row["chosen"] for row in draws[1]]
    stamps = {file: file.stat().st_mtime_ns for file in root.rglob("cell.json")}
    assert run("--table").count("| dpo |") == 3 and len(read_json(root / "table.json")) == 3 * len(ARMS)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("cell.json")} == stamps
    known = tmp_path / "known.jsonl"
    known.write_bytes((root / "cells.jsonl").read_bytes())
    options[options.index(str(root))] = str(tmp_path / "again")
    run("--known", str(known))
    assert not list((tmp_path / "again").rglob("cell.json"))
