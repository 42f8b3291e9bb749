"""The report that the verbs of `align eval` share: what a later command leaves of an earlier one's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.commands import evaluation_report
from align.commands.evaluation_report import publish
from align.evaluation.win_table import win_table
from align.evaluation.winrate import win_rate
from align.io.files import read_json

VERDICTS = {
    ("a", "b"): np.array([1.0, 1, 0, 0.5]), ("a", "c"): np.array([0.0, 1, 0, 1]), ("b", "c"): np.array([1.0, 1, 0, 0]),
}  # fmt: skip


def section(pair: tuple[str, str], verdict: np.ndarray) -> dict[str, Any]:
    rate = win_rate(verdict, verdict, np.arange(len(verdict)), np.zeros(len(verdict))).to_dict()
    return {"a": pair[0], "b": pair[1], "judge": "j", "win_rate": rate, "run": {}}


def added(output: Path, verdicts: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """What the report holds after a comparison by the judge j."""
    part: dict[str, Any] = {
        "comparisons": {f"{a} against {b}, j": section((a, b), v) for (a, b), v in verdicts.items()}
    }
    if len(verdicts) > 1:
        part["win_tables"] = {"j": win_table(verdicts)}
    publish(output, part, {})
    return dict(read_json(output / "report.json"))


def test_a_table_of_other_prompts_does_not_stand_above_new_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.reports.comparison_page.write_comparison_page", lambda *given: None)
    told: list[str] = []
    monkeypatch.setattr(evaluation_report.log, "warning", lambda text, *of: told.append(text % of))
    assert set(added(tmp_path, VERDICTS)["win_tables"]) == {"j"}
    found = added(tmp_path, {("a", "b"): VERDICTS["a", "b"]})
    assert found["win_tables"] == {"j": win_table(VERDICTS)}, "the same verdicts again"
    assert added(tmp_path, {("a", "d"): np.ones(4)})["win_tables"] == found["win_tables"] and not told
    found = added(tmp_path, {("b", "a"): VERDICTS["a", "b"]})
    assert not found["win_tables"] and len(told) == 1 and "by j was of other prompts" in told[0]
    longer = {pair: np.concatenate([verdict, verdict]) for pair, verdict in VERDICTS.items()}
    assert added(tmp_path, longer)["win_tables"]["j"] == win_table(longer) and len(told) == 1
    assert added(tmp_path, {("a", "b"): VERDICTS["a", "b"]})["win_tables"] == {} and len(told) == 2
