"""The studies of policies on filtered pairs, on tiny models: their pairs, their tables, resuming."""

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.io.files import read_json
from scripts.assets.demo_data import Snippet
from scripts.reproduce import whole as reproduce_whole
from scripts.study import filtered_policies as study_filtered_policies
from scripts.study.filtered_policies import ARMS, LOSSES, flip, gold_pairs
from tests.helpers.builders import bert_reward, causal
from tests.helpers.snippets import snippets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    causal(folder / "smollm2")
    bert_reward(folder / "minilm")
    snippets(folder / "snippets", 260)
    return folder


def run(study: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Run the command of a study."""
    monkeypatch.setattr(sys, "argv", ["study", *options])
    study.main()


@given(st.integers(0, 99), st.floats(0, 1), st.integers(4, 30))
def test_labels(seed: int, share: float, count: int) -> None:
    """Gold prefers the chosen of every clean pair, no snippet is in two pairs, exactly a share is flipped."""
    rng = random.Random(seed)
    made = [Snippet(str(k), f"text {k}", tuple(rng.randint(-4, 4) for _ in range(3))) for k in range(2 * count)]
    clean = gold_pairs(made, count, rng)
    texts = [row[side] for row in clean for side in ("chosen", "rejected")]
    assert all(row["gold_margin"] > 0 for row in clean) and len(set(texts)) == len(texts)
    noisy = flip(clean, share, rng)
    turned = [k for k, (a, b) in enumerate(zip(clean, noisy, strict=True)) if a != b]
    assert len(turned) == round(share * len(clean))
    assert all(noisy[k]["gold_margin"] == -clean[k]["gold_margin"] for k in turned)
    assert flip(clean, 0.0, rng) == clean


SMALL = ("--pairs", "24", "--keep", "0.5", "--clean-pairs", "8", "--prompts", "6", "--batch", "4", "--seeds", "0")


def test_filtered_policies(assets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--assets", str(assets), *SMALL, "--max-new-tokens", "4", "--flipped", "0.25"]
    run(study_filtered_policies, monkeypatch, *options, "--output", str(tmp_path / "made"))
    rows = read_json(tmp_path / "made" / "table.json")["rows"]
    assert [row["arm"] for row in rows] == list(ARMS)
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["all pairs"]["pairs"] == 24 and by_arm["all pairs"]["gold_labels"] == 0.75
    sizes = {by_arm[arm]["pairs"] for arm in ("random", "filtered", "largest margins")}
    assert len(sizes) == 1 and sizes.pop() <= 12
    assert all(by_arm["random"][loss]["less_random"]["value"] == 0 for loss in LOSSES)
    again = ["--output", str(tmp_path / "again"), "--known", str(tmp_path / "made" / "cells.jsonl")]
    run(study_filtered_policies, monkeypatch, *options, *again)
    assert read_json(tmp_path / "again" / "table.json")["rows"] == rows
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"cells.jsonl", "table.json"}, "nothing was made"


def test_the_whole(assets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every route ends at trl's CPU seconds, and what it does before training counts."""
    options = ["--assets", str(assets), "--pairs", "64", "--prompts", "4", "--seeds", "0", "--output", str(tmp_path)]
    run(reproduce_whole, monkeypatch, *options)
    rows = read_json(tmp_path / "table.json")["rows"]
    found: dict[str, list[dict[str, Any]]] = {route: [] for route in reproduce_whole.ROUTES}
    for row in rows:
        found[row["route"]].append(row)
    budget = found["trl"][-1]["seconds"]
    for route, marks in found.items():
        seconds = [mark["seconds"] for mark in marks]
        assert len(marks) == reproduce_whole.MARKS and seconds == sorted(seconds)
        steps, kls = ({mark[name] for mark in marks} for name in ("step", "kl"))
        assert len(kls) == len(steps), "every mark is a policy of its own"
        if route != "trl":
            shares = np.array(seconds) / budget
            assert (shares >= np.arange(1, 5) / 4).all(), "a quarter is full before it is put aside"
    assert found["whole"][0]["before_training"] > found["dpo"][0]["before_training"]
    assert all(mark["less_trl"]["value"] == 0 for mark in found["trl"])
    assert (tmp_path / "curves.svg").stat().st_size > 0
