"""Kept results of benchmarks: what became slower by more than the noise of its rounds is named, and nothing else."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import record
from scripts.bench.record import Measure, compared, finish


def result(values: list[float], unit: Any = "s", yardstick: float = 1.0, **more: Any) -> dict[str, Any]:
    """A result with one measure."""
    measures = {"policy": Measure(values, unit).to_dict()}
    return {"commit": "c" * 40, "machine": {"cores": 2}, "settings": {"rounds": len(values)},
            "yardstick": [yardstick], "measures": measures} | more  # fmt: skip


@pytest.mark.parametrize(("old", "new", "named"), [
    ([10.0, 10.1, 9.9], [12.0, 12.1, 11.9], True), ([10.0, 10.1, 9.9], [8.0, 8.1, 7.9], False),
    ([10.0, 13.0, 8.0], [11.5, 9.0, 14.0], False), ([10.0, 10.01, 9.99], [10.1, 10.11, 10.09], False),
    ([4.0, 4.0], [5.0, 5.0], True), ([4.0, 4.0], [4.0, 4.0], False),
])  # fmt: skip
def test_what_is_worse_by_more_than_its_noise_is_named(old: list[float], new: list[float], named: bool) -> None:
    (line,) = compared(result(old), result(new))
    assert line.startswith("policy is") == named and ("slower than at cccccccccc" in line)


def test_seconds_are_those_of_the_yardstick_and_ratios_are_not() -> None:
    """A machine that is slower for a while is no slower program."""
    slow = [20.0, 20.2, 19.8]
    assert compared(result([10.0, 10.1, 9.9]), result(slow, yardstick=2.0))[0].startswith("nothing slower")
    line = compared(result([10.0, 10.1, 9.9], "ratio"), result(slow, "ratio", yardstick=2.0))[0]
    assert "100% slower against the other program" in line


def test_what_cannot_be_compared_says_why() -> None:
    assert compared(None, result([1.0, 2.0])) == ["the first result, nothing to compare with"]
    other = compared(result([1.0, 1.0]), result([1.0, 1.0], machine={"cores": 4}))
    assert other == ["not compared: the kept result has other machine, cores: 2 and not 4"]
    assert "rounds: 2 and not 3" in compared(result([1.0, 1.0]), result([1.0, 1.0, 1.0]))[0]
    assert "1 measures have a single round" in compared(result([1.0]), result([2.0]))[0]


def test_a_result_is_kept_with_machine_date_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "yardstick", lambda: [1.0])
    arguments = argparse.Namespace(keep=tmp_path / "bench", rounds=2, assets=tmp_path)
    for values in ([1.0, 1.01], [2.0, 2.01]):
        finish("steps", {"pairs": 3}, {"step": Measure(values, "s")}, arguments)
    printed = capsys.readouterr()
    assert "the first result" in printed.err and "step is 100% slower" in printed.err
    kept = json.loads((tmp_path / "bench" / "steps.json").read_text())
    assert kept["measures"]["step"]["values"] == [2.0, 2.01] and kept["found"] == {"pairs": 3}
    assert {"date", "commit", "machine", "settings"} <= kept.keys() and "keep" not in kept["settings"]
