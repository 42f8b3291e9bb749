"""Cells that were computed twice: agreement, disagreement, and files that cannot be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.reproduce import agree

OLD = np.random.default_rng(0).normal(1.0, 2.0, 100)


def cells(file: Path, keyed: dict[str, np.ndarray]) -> Path:
    rows: list[dict[str, Any]] = [
        {"key": key, "method": key, "decoded": {"1": {"reward": reward.tolist()}}} for key, reward in keyed.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arena(file: Path, madpo: float) -> Path:
    row = {"cell": {"pairs": 100}, "difference": {"0.5": {"dpo": 1.0, "madpo": [madpo, 0.1, 0.3]}}}
    file.write_text(json.dumps({"rows": [row]}))
    return file


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *files: Path) -> tuple[Any, list[Any]]:
    monkeypatch.setattr("sys.argv", ["agree", *map(str, files)])
    with pytest.raises(SystemExit) as ended:
        agree.main()
    return ended.value.code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.3, 0), (0.6, 1), (-0.6, 1)])
def test_a_mean_within_the_old_interval_agrees(
    shift: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval of 100 draws with standard deviation 2 is about 0.4 wide on each side."""
    new = OLD.copy()
    new[:90] += shift / 0.9
    old, now = cells(tmp_path / "old.jsonl", {"a": OLD, "b": OLD}), cells(tmp_path / "new.jsonl", {"a": new, "c": new})
    ended, found = run(monkeypatch, capsys, old, now)
    assert ended == code and len(found) == 1 and found[0]["method"] == "a"
    assert found[0]["agrees"] == (not code)
    assert found[0]["same"] == (100 if shift == 0 else 10)
    assert found[0]["again"] == pytest.approx(new.mean())
    assert found[0]["reward"]["value"] == pytest.approx(OLD.mean())


@pytest.mark.parametrize(("now", "code"), [(0.3, 0), (0.31, 1)])
def test_rows_of_the_arena(
    now: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, (found,) = run(monkeypatch, capsys, arena(tmp_path / "old.json", 0.2), arena(tmp_path / "new.json", now))
    assert ended == code
    assert found == {
        "pairs": 100, "methods": 1, "inside": 1 - code, "furthest": pytest.approx(now - 0.2), "agrees": not code
    }  # fmt: skip


def test_nothing_in_common_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, now = cells(tmp_path / "old.jsonl", {"a": OLD}), cells(tmp_path / "new.jsonl", {"b": OLD})
    assert run(monkeypatch, capsys, old, now) == (2, [])
