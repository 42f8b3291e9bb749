"""The trust study on two cells: what it writes, what it computes again, and its regret by hand."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.io.files import read_json
from scripts.study import trust

CELLS = [("independent 0.3", 0.0, 100), ("out-of-fold 5", 0.4, 100)]


def test_one_command_makes_blocks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "cells", lambda sizes: CELLS)
    monkeypatch.setattr(sys, "argv", ["trust", "--output", str(tmp_path), "--seeds", "4", "--block", "2"])
    trust.main()
    blocks = {file: file.read_bytes() for file in tmp_path.glob("100-*.json")}
    assert len(blocks) == 4
    table = read_json(tmp_path / "table.json")
    rows = table["rows"]["0.5"]
    assert set(rows) == {"independent 0.3, 0% flipped, 100 pairs", "out-of-fold 5, 40% flipped, 100 pairs"}
    assert rows["independent 0.3, 0% flipped, 100 pairs"]["regret"]["DPO"] > 0, "exact margins are better than labels"
    lost = trust.block_file(tmp_path, CELLS[1], 1)
    lost.unlink()
    monkeypatch.setattr(trust, "run_seed", count(trust.run_seed, made := []))
    trust.main()
    assert made == [2, 3] and lost.read_bytes() == blocks[lost] and read_json(tmp_path / "table.json") == table


def count(function: Any, made: list[int]) -> Any:
    """``function``, with the seeds of its calls recorded in ``made``."""

    def counted(*cell: Any) -> Any:
        made.append(cell[-1])
        return function(*cell)

    return counted


def test_regret_is_to_the_better_end() -> None:
    """Regret is per seed, against whichever of DPO and soft labels is better on average."""
    evidence = dict.fromkeys(("slope", "shared_error", "independent_error", "flip_rate"), 1.0)
    same = {"chosen": {"trust": [1, 0], "combined": [0, 0]}, "labels_prefer_dpo": 1.0, "evidence": evidence}
    rewards = [(1.0, 0.5, 0.8), (2.0, 0.5, 1.8), (3.0, 0.7, 2.8)]
    results = [
        {"reward": {"DPO": [dpo], "soft labels": [soft], "trust": [trusted]}} | same for dpo, soft, trusted in rewards
    ]
    row = trust.row(results, 0)
    assert row["regret"] == pytest.approx({"DPO": 0, "soft labels": np.mean([0.5, 1.5, 2.3]), "trust": 0.2})
    assert row["half_width"]["trust"] == pytest.approx(0, abs=1e-12)
    assert row["half_width"]["soft labels"] == pytest.approx(1.96 * np.std([0.5, 1.5, 2.3], ddof=1) / np.sqrt(3))
