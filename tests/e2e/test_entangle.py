"""`align entangle` on the command line, with a tiny model; the real small one where marked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.commands.entangle import trace
from align.entanglement.measure_pairs import measure_entanglement
from align.errors import ConfigError
from align.evaluation.policies import Policy, find_reference
from align.models.loading import load_policy, load_tokenizer
from tests.helpers.bad_input_makers import run_command
from tests.helpers.builders import rows, trained_adapter

STEPS = (0, 2, 4, 6)
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
    assert page.count('class="matrix"') == 1
    again = align(*command, folder=tmp_path)
    assert again.returncode == 0 and "up to date, skipped" in again.stderr
    assert "up to date" not in align(*command, "--loss", "madpo", folder=tmp_path).stderr


def test_other_columns_of_the_same_file_are_measured_anew(tiny_policy: Path, tmp_path: Path) -> None:
    """Margins and texts follow the column mapping, whatever the folder holds; the same mapping reuses its results."""
    table = rows(6)
    for row in table:
        row |= {"m_a": row.pop("margin"), "c2": row["rejected"], "r2": row["chosen"]}
        row["m_b"] = -row["m_a"]  # type: ignore[operator]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))

    def measured(*columns: str) -> tuple[dict[str, list[float]], bool]:
        command = ["entangle", "report", "pairs.jsonl", "--model", str(tiny_policy), "--output", "out", "--shown", "0"]
        mapping = [part for column in columns for part in ("--column", column)]
        done = align(*command, "--loss", "madpo", *mapping, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found = Dataset.from_parquet(str(tmp_path / "out" / "measurements" / "entanglement.parquet"))
        columns_read = ("margin", "d_w", "logp_chosen", "logp_rejected")
        return {name: list(found[name]) for name in columns_read}, "up to date, skipped" in done.stderr

    first, _ = measured("margin=m_a")
    negated, skipped = measured("margin=m_b")
    assert not skipped and negated["margin"] == [-value for value in first["margin"]] and negated["d_w"] != first["d_w"]
    swapped, skipped = measured("margin=m_b", "chosen=c2", "rejected=r2")
    assert not skipped and swapped["margin"] == negated["margin"]
    assert swapped["logp_chosen"] == pytest.approx(first["logp_rejected"]) != pytest.approx(first["logp_chosen"])
    assert measured("margin=m_b", "chosen=c2", "rejected=r2") == (swapped, True)


def test_a_pair_without_a_margin_is_measured_where_none_is_needed(tiny_policy: Path, tmp_path: Path) -> None:
    table = rows(34)  # two shards, the second without any margin
    for row in (table[2], *table[32:]):
        row["margin"] = None
    (tmp_path / "gap.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    command = ("entangle", "report", "gap.jsonl", "--model", str(tiny_policy), "--output", "out", "--shown", "0")
    code, _, errors = run_command(command, tmp_path)
    assert code == 0, errors
    found = Dataset.from_parquet(str(tmp_path / "out" / "measurements" / "entanglement.parquet"))
    assert list(found["margin"]) == [row["margin"] for row in table] and np.isfinite(found["cosine"]).all()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["summary"]
    assert -1 <= summary["cosine_against"]["margin"] <= 1
    code, _, errors = run_command((*command[:-1], "1", "--loss", "madpo"), tmp_path)
    assert code == 2 and "error [loss-needs-margin] " in errors and "Traceback" not in errors
    assert "a `margin` of every pair, found none of p2, p32, p33" in errors


def test_a_parameter_is_read_as_in_a_run(tiny_policy: Path, tmp_path: Path) -> None:
    """YAML 1.1 reads a number without a point as text."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    command = ("entangle", "report", "pairs.jsonl", "--model", str(tiny_policy), "--output", "out", "--shown", "0")
    for parameter in ("beta=1e-2", "beta=0.01"):
        code, _, errors = run_command((*command, "--parameter", parameter), tmp_path)
        assert code == 0, errors
    assert "up to date, skipped" in errors
    manifest = json.loads((tmp_path / "out" / "measurements" / "manifest.json").read_text())
    assert manifest["inputs"]["loss_parameters"] == {"beta": 0.01}


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


def trained(tiny_policy: Path, folder: Path, lora: dict[str, Any] | None = None, **trainer: Any) -> None:
    """Train ``runs/r`` with DPO on eight pairs, at a rate that moves every response."""
    (folder / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    fields = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.03, "bf16": False, "use_cpu": True}
    run = {
        "name": "r",
        "pairs": {"path": "eight.jsonl"},
        "train": {
            "model": str(tiny_policy),
            "methods": {"dpo": {"loss": "dpo"}},
            "peft": lora,
            "trainer": fields | trainer,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    done = align("train", "run.yaml", folder=folder)
    assert done.returncode == 0, done.stderr


def test_trace_over_checkpoints(tiny_policy: Path, tmp_path: Path) -> None:
    """The start and every checkpoint, log-probs as they have them; the second call measures nothing."""
    trained(tiny_policy, tmp_path, save_strategy="steps", save_steps=2)
    command = ["entangle", "trace", "runs/r", "--method", "dpo"]
    done = align(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "r" / "trace-dpo"
    found = json.loads((folder / "trace.json").read_text())
    assert [point["step"] for point in found["points"]] == [0, 2, 4, 6]
    assert [(row["from"], row["to"]) for row in found["intervals"]] == [(0, 2), (2, 4), (4, 6)]
    tables = [Dataset.from_parquet(str(folder / f"step-{step:06d}" / "entanglement.parquet")) for step in STEPS]
    assert not np.any([tables[0]["logp_chosen_change"], tables[0]["logp_rejected_change"]])
    base = load_policy(str(tiny_policy), dtype="float32")
    measured = measure_entanglement(base, load_tokenizer(str(tiny_policy)), Dataset.from_list(rows(8)))
    assert np.allclose(sorted(tables[0]["inner"]), sorted(measured["inner"]), rtol=1e-3)
    for point, table in zip(found["points"], tables, strict=True):
        assert point["chosen_change"] == pytest.approx(np.mean(table["logp_chosen_change"]))
        assert table["id"] == tables[0]["id"] and len(table) == 8
    gaps = [np.mean(table["logp_chosen"]) - np.mean(table["logp_rejected"]) for table in tables]
    assert gaps[3] > gaps[1] > gaps[0]
    levels = [point["chosen_change"] for point in found["points"]]
    assert found["peak_step"] == STEPS[int(np.argmax(levels))]
    page = (folder / "report.html").read_text()
    assert "<script" not in page and found["sentence"].split(";")[0] in page
    again = align(*command, folder=tmp_path)
    assert again.returncode == 0 and again.stderr.count("up to date, skipped") == 4


def test_a_trace_of_a_new_adapter_begins_with_the_adapter(tiny_policy: Path, tmp_path: Path) -> None:
    """Its first weights are kept: half of them are random, and the first gradients depend on these."""
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    trained(tiny_policy, tmp_path, lora, save_strategy="steps", save_steps=2, max_steps=2)
    run = tmp_path / "runs" / "r"
    trace(run, "dpo", limit=64, batch_tokens=2048, max_length=None)
    first, last = (Dataset.from_parquet(str(run / "trace-dpo" / f"step-{step:06d}" / "entanglement.parquet"))
                   for step in (0, 2))  # fmt: skip
    assert not np.any([first["logp_chosen_change"], first["logp_rejected_change"]])
    assert np.abs(last["logp_chosen_change"]).max() > 1e-3 and np.min(first["chosen_sq"]) > 0
    base = load_policy(str(tiny_policy), dtype="float32")
    start = load_policy(str(run / "train-dpo" / "start"), dtype="float32")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(base(input_ids=ids).logits, start(input_ids=ids).logits)
    (run / "train-dpo" / "start").rename(tmp_path / "gone")  # as of an earlier version
    trace(run, "dpo", limit=64, batch_tokens=2048, max_length=None)
    found = json.loads((run / "trace-dpo" / "trace.json").read_text())
    assert [point["step"] for point in found["points"]] == [2]


def test_a_training_that_went_on_from_an_adapter_is_measured_against_it(tiny_policy: Path, tmp_path: Path) -> None:
    """After a negligible step the policy equals its start, in the trace and at the start of an evaluation."""
    adapter = trained_adapter(tiny_policy, tmp_path / "adapter", 1)
    trained(adapter, tmp_path, save_strategy="steps", save_steps=1, max_steps=1, learning_rate=1e-9, max_length=32)
    run = tmp_path / "runs" / "r"
    trace(run, "dpo", limit=64, batch_tokens=2048, max_length=None)
    table = Dataset.from_parquet(str(run / "trace-dpo" / "step-000001" / "entanglement.parquet"))
    assert np.abs(table["logp_chosen_change"]).max() < 1e-3 and np.abs(table["logp_chosen"]).min() > 1
    made = json.loads((run / "trace-dpo" / "step-000001" / "manifest.json").read_text())
    assert made["inputs"]["max_length"] == 32
    for model in ("train-dpo/model", "train-dpo/checkpoints/checkpoint-1"):
        assert find_reference([Policy("dpo", str(run / model))], None).model == str(adapter)
    moved = run.rename(tmp_path / "moved") / "train-dpo" / "model"
    (moved.parent / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="--reference: needed"):
        find_reference([Policy("dpo", str(moved))], None)


def test_a_trace_measures_what_was_trained(tiny_policy: Path, tmp_path: Path) -> None:
    """The trace reads the pairs that a filter kept and the trust that the run measured."""
    trained(tiny_policy, tmp_path, save_strategy="steps", save_steps=6)
    run = tmp_path / "runs" / "r"
    file = run / "train-dpo" / "manifest.json"
    manifest = json.loads(file.read_text())
    trust = {"slope": 0.4, "trust": 0.9, "strength": 0.25}
    manifest["inputs"] |= {"trust": trust, "loss": {"loss": "trust", "parameters": {"beta": 0.2}}}
    manifest["inputs"]["after"] |= {"filter": "0"}
    file.write_text(json.dumps(manifest))
    (run / "filter").mkdir()
    Dataset.from_list(rows(5)).to_parquet(str(run / "filter" / "kept.parquet"))
    trace(run, "dpo", limit=64, batch_tokens=2048, max_length=64)
    made = json.loads((run / "trace-dpo" / "step-000006" / "manifest.json").read_text())
    assert made["inputs"]["loss_parameters"].items() >= (trust | {"beta": 0.2}).items()
    assert made["inputs"]["pairs"] == [row["id"] for row in rows(5)]


def test_trace_needs_a_training_with_checkpoints(tiny_policy: Path, tmp_path: Path) -> None:
    trained(tiny_policy, tmp_path)
    for method, message in (
        ("dpo", "no checkpoint to measure"),
        ("madpo", "no finished training (methods here: dpo)"),
    ):
        done = align("entangle", "trace", "runs/r", "--method", method, folder=tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_two_processes_measure_what_one_does(tiny_policy: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    command = ["entangle", "report", "pairs.jsonl", "--model", str(tiny_policy), "--shown", "1", "--output"]
    assert align(*command, "one", folder=tmp_path).returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29573"]
    done = subprocess.run(
        [*launcher, "-m", "align.cli", *command, "two"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (
        Dataset.from_parquet(str(tmp_path / name / "measurements" / "entanglement.parquet")) for name in ("one", "two")
    )
    assert one["id"] == two["id"] and one["verdict"] == two["verdict"]
    for name in ("chosen_sq", "rejected_sq", "inner", "logp_chosen", "step_chosen"):
        assert np.allclose(one[name], two[name], rtol=1e-5), name
    assert (tmp_path / "two" / "report.html").exists()


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
        (["--parameter", "beta=fast"], "--parameter beta=fast: found 'fast', expected a finite number, or true or"),
        (["--parameter", "beta=[1"], "--parameter beta=[1: found '[1', expected a finite number"),
        (["--parameter", "beta=.nan"], "--parameter beta=.nan: found '.nan', expected a finite number"),
        (["--parameters", "nothing_like_it"], "no trained parameter whose name matches 'nothing_like_it'"),
        (["--max-length", "4"], "none of 10 pairs has a token of a response within 4 tokens"),
    ],
)
def test_mistakes_are_told_in_one_message(
    tiny_policy: Path, pairs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = ("entangle", "report", str(pairs), "--model", str(tiny_policy), "--output", "out", *arguments)
    code, _, errors = run_command(command, tmp_path)
    assert code == 2 and message in errors and "Traceback" not in errors
