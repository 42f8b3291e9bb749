"""`align entangle` on the command line, with a tiny model; the real small one where marked."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.builders import rows

BAD = "<script>alert(1)</script>"


def align(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    table = rows(10)
    table[0]["id"] = BAD
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    return file


def test_report_and_again(tiny_policy: Path, pairs: Path, tmp_path: Path) -> None:
    """A table, numbers, an escaped page; the second call measures nothing and an adapter gives another result."""
    command = ["entangle", "report", str(pairs), "--model", str(tiny_policy), "--output", "out", "--shown", "10"]
    done = align(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = Dataset.from_parquet(str(tmp_path / "out" / "measurements" / "entanglement.parquet"))
    assert len(table) == 10 and np.allclose(table["d_w"], table["d_l"])
    assert np.all(np.abs(table["cosine"]) <= 1 + 1e-6)
    norms = np.sqrt(np.array(table["chosen_sq"]) * np.array(table["rejected_sq"]))
    assert np.allclose(table["inner"], np.array(table["cosine"]) * norms)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["summary"]["pairs"] == 10 and sum(summary["summary"]["shares"].values()) == pytest.approx(1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "Content-Security-Policy" in page
    again = align(*command, folder=tmp_path)
    assert again.returncode == 0 and "up to date, skipped" in again.stderr
    assert "up to date" not in align(*command, "--loss", "madpo", folder=tmp_path).stderr


def test_an_adapter_is_measured_against_its_base(tiny_policy: Path, pairs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_bytes((tiny_policy / "tokenizer.json").read_bytes())
    (tmp_path / "adapter" / "tokenizer_config.json").write_bytes((tiny_policy / "tokenizer_config.json").read_bytes())
    done = align("entangle", "report", str(pairs), "--model", "adapter", "--output", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = Dataset.from_parquet(str(tmp_path / "out" / "measurements" / "entanglement.parquet"))
    assert np.abs(table["logp_chosen_change"]).max() > 1e-3
    trained = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["parameters"] == trained


def test_check(tiny_policy: Path, pairs: Path, tmp_path: Path) -> None:
    rates = ["--sgd", "0.05", "--adamw", "1e-3"]
    done = align("entangle", "check", str(pairs), "--model", str(tiny_policy), "--output", "o", *rates, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for result in json.loads((tmp_path / "o" / "check.json").read_text())["optimizers"].values():
        assert result["steps"][-1]["sign_agreement"] >= 0.99 and 1.8 < result["order_of_error"] < 2.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "dpoo"], "loss 'dpoo' is not known (did you mean `dpo`?)"),
        (["--loss", "beta_dpo"], "a pair alone has no verdict"),
        (["--parameter", "beta"], "expected name=number"),
        (["--parameter", "betta=0.1"], "betta: not a parameter of dpo"),
        (["--parameters", "nothing_like_it"], "no trained parameter whose name matches 'nothing_like_it'"),
        (["--max-length", "4"], "no token of a response is left within 4 tokens"),
    ],
)
def test_mistakes_are_told_in_one_message(
    tiny_policy: Path, pairs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = ["entangle", "report", str(pairs), "--model", str(tiny_policy), "--output", "out", *arguments]
    done = align(*command, folder=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
