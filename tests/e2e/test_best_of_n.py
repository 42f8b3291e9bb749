"""`align generate -n N`, then `align best-of-n`, as a user types them: a server's samples, the real small model's."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.test_generate import start_and_kill
from tests.generation.test_server_engine import Fake, Reply
from tests.helpers.bad_input_makers import run_command
from tests.helpers.builders import bert_reward, causal
from tests.helpers.command_line import align, jsonl

WORDS = (" awful", " wonderful", " bad", " good", " a table")


def opinions(path: str, body: dict[str, Any], number: int) -> Reply:
    """Answer with a completion that the seed decides, after a short delay."""
    time.sleep(0.01)
    text = WORDS[body["seed"] % len(WORDS)]
    return 200, {"choices": [{"text": text, "finish_reason": "stop", "token_ids": [1, 2]}]}


def test_the_best_samples_of_a_server(tmp_path: Path) -> None:
    bert_reward(tmp_path / "reward")
    jsonl(tmp_path / "prompts.jsonl", [{"id": f"p{k}", "prompt": f"it is {k}"} for k in range(30)])
    with Fake(opinions).running() as address:
        command = ["generate", "prompts.jsonl", "--model", "policy", "--base-url", address, "-n", "5"]
        killed = start_and_kill([*command, "--output", "n"], tmp_path, tmp_path / "n.partial" / "finished.jsonl", 3)
        sampled = align(*command, "--output", "n", cwd=tmp_path)
    assert sampled.returncode == 0 and f"{len(killed)} of 30 prompts are finished already" in sampled.stderr
    best = align("best-of-n", "n", "--judge", "vader", "--gold", "./reward", "--output", "best", cwd=tmp_path)
    assert best.returncode == 0, best.stderr
    found = json.loads(best.stdout)
    assert (found["n"], found["scorer"], found["gold"]) == (5, "vader", "./reward")
    values = [row["score"]["value"] for row in found["curve"]]
    assert values == sorted(values) and found["curve"][-1]["gain"]["low"] > 0
    assert found["curve"][4]["kl_bound"] == pytest.approx(0.8094, abs=1e-4)
    rows = pq.read_table(tmp_path / "best" / "completions.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"p{k}" for k in range(30)]
    assert sum(row["score"] for row in rows) / 30 == pytest.approx(values[-1])
    page = (tmp_path / "best" / "report.html").read_text()
    assert "./reward" in page and f"{values[-1]:.2f}"[:3] in page and page.count("<article>") == 30
    again = align("best-of-n", "n", "--judge", "vader", "--gold", "./reward", "--output", "best", cwd=tmp_path)
    assert "up to date, skipped" in again.stderr and json.loads(again.stdout) == found


def test_mistakes_cost_one_line(tmp_path: Path) -> None:
    causal(tmp_path / "policy")
    jsonl(tmp_path / "c.jsonl", [{"id": "a", "prompt": "p", "completion": "c"}])
    cases = [
        (["c.jsonl"], "give either a reward model or a judge"),
        (["c.jsonl", "--judge", "vadder"], "did you mean `vader`"),
        (["c.jsonl", "--judge", "vader", "--gold", "vader"], "found the judge that chooses"),
        (["c.jsonl", "--judge", "vader", "--format", "csv"], "expected parquet or jsonl"),
        (["policy", "--judge", "vader"], "holds no completions.parquet"),
        (["gone.jsonl", "--judge", "vader"], "gone.jsonl"),
        (["c.jsonl", "--reward-model", "./gone"], "'./gone': found nothing"),
    ]
    for arguments, said in cases:
        code, _, errors = run_command(("best-of-n", *arguments, "--output", "out"), tmp_path)
        assert code == 2 and said in errors and "Traceback" not in errors, errors
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_the_best_of_the_real_small_model(assets: Path, tmp_path: Path) -> None:
    texts = ["The film was", "I had dinner at a place that", "The best thing about this camera is", "My new phone"]
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    sampled = align("generate", "prompts.jsonl", "--model", str(assets / "smollm2"), "--engine", "transformers",
                    "-n", "4", "--max-new-tokens", "12", "--output", "n", cwd=tmp_path)  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    best = align("best-of-n", "n", "--judge", "vader", "--output", "best", cwd=tmp_path)
    assert best.returncode == 0, best.stderr
    values = [row["score"]["value"] for row in json.loads(best.stdout)["curve"]]
    assert values == sorted(values) and values[-1] > values[0]
    rows = {
        (row["id"], row["sample"]): row for row in pq.read_table(tmp_path / "n" / "completions.parquet").to_pylist()
    }
    for row in pq.read_table(tmp_path / "best" / "completions.parquet").to_pylist():
        assert row["completion"] == rows[row["id"], row["sample"]]["completion"]
