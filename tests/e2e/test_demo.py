"""`make demo` on less of its data: its own configuration, real texts, the real models."""

import json
import sys
from pathlib import Path

import pytest

from scripts.assets import demo_data
from tests.helpers.bad_input_makers import run_command

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
SIZES = ("--pairs", "64", "--heldout-pairs", "32", "--train-prompts", "16", "--eval-prompts", "8")


def test_the_demo_on_less_data(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its pairs share one prompt; two folds are made nevertheless."""
    (tmp_path / ".assets").mkdir()
    for name in ("minilm", "smollm2", "snippets"):
        (tmp_path / ".assets" / name).symlink_to(assets / name)
    output = tmp_path / ".assets" / "demo"
    monkeypatch.setattr(sys, "argv", ["demo_data", "--assets", str(assets), "--output", str(output), *SIZES])
    demo_data.main()
    code, _, errors = run_command(("run", str(CONFIG)), tmp_path)
    assert code == 0, errors
    run = tmp_path / "runs" / "demo"
    assert json.loads((run / "crossfit" / "metrics.json").read_text())["n"] == 64
    summary = json.loads((run / "summary.json").read_text())
    assert {"judge_gain_dpo", "judge_gain_madpo", "kl_madpo", "reward_model_accuracy_out_of_fold"} <= set(summary)
    assert {"report.html", "log.txt"} <= {file.name for file in run.iterdir()}
