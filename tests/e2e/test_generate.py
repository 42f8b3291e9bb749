"""`align generate` and `align pairs build` as a user types them, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from align.data.pairs import read_pairs
from tests.generation.test_server_engine import Fake, Reply, echo
from tests.helpers.bad_input_makers import run_command
from tests.helpers.builders import bert_reward, causal
from tests.helpers.command_line import align, jsonl

PROMPTS = [{"prompt": f"the {word} film {'very ' * k}is"} for k in range(4) for word in ("good", "bad", "dull")]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "reward")
    jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


def command(output: str) -> tuple[str, ...]:
    named = ("--model", "policy", "--output", output)
    return ("generate", "prompts.jsonl", *named, "-n", "3", "--max-new-tokens", "8")


def generate(cwd: Path, output: str, *more: str) -> subprocess.CompletedProcess[str]:
    return align(*command(output), *more, cwd=cwd)


def table(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "completions.parquet").to_pylist()


def test_generate_build_train(workspace: Path) -> None:
    made = generate(workspace, "out", "--engine", "transformers", "--logprobs")
    assert made.returncode == 0, made.stderr
    rows = table(workspace / "out")
    assert len(rows) == 36 and len({row["id"] for row in rows}) == 12
    assert [row["sample"] for row in rows[:4]] == [0, 1, 2, 0]
    assert all(len(row["token_ids"]) == len(row["logprobs"]) == row["tokens"] for row in rows)
    assert "tokens/s" in made.stderr and "align pairs build" in made.stderr
    again = generate(workspace, "out", "--engine", "transformers", "--logprobs")
    assert again.returncode == 0 and "up to date" in again.stderr

    lines = generate(workspace, "lines", "--engine", "transformers", "--format", "jsonl", "--batch-size", "2")
    assert lines.returncode == 0, lines.stderr
    written = [json.loads(line) for line in (workspace / "lines" / "completions.jsonl").read_text().splitlines()]
    kept = ("id", "sample", "prompt", "completion", "tokens", "finish_reason")
    assert written == [{name: row[name] for name in kept} for row in rows]

    build = ("pairs", "build", "out", "--reward-model", "reward", "--output")
    paired = align(*build, "pairs", "--mode", "all", "--guard-margin", "0.001", cwd=workspace)
    assert paired.returncode == 0, paired.stderr
    summary = json.loads(paired.stdout)
    pairs = read_pairs(workspace / "pairs")
    assert summary["pairs"] == len(pairs) and summary["prompts"] <= 12
    assert all(row["margin"] >= 0.001 and row["scorer"] == "reward" for row in pairs)
    scored = align("reward", "score", "pairs/pairs.parquet", "--model", "reward", "--output", "scored", cwd=workspace)
    assert scored.returncode == 0, scored.stderr
    assert read_pairs(workspace / "scored")["margin"][:] == pytest.approx(pairs["margin"][:], abs=1e-5)

    small = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    train = {"model": "policy", "methods": {"madpo": {"loss": "madpo"}}, "trainer": small}
    run = {"name": "r", "pairs": {"path": "pairs/pairs.parquet"}, "train": train}
    (workspace / "run.yaml").write_text(yaml.safe_dump(run))
    trained = align("train", "run.yaml", cwd=workspace)
    assert trained.returncode == 0, trained.stderr


def test_messages_go_through_the_chat_template(workspace: Path) -> None:
    chat = [{"id": f"c{k}", "prompt": [{"role": "user", "content": row["prompt"]}]} for k, row in enumerate(PROMPTS)]
    jsonl(workspace / "prompts.jsonl", chat)
    made = generate(workspace, "out", "--engine", "transformers")
    assert made.returncode == 0, made.stderr
    first = table(workspace / "out")[0]
    assert first["id"] == "c0" and first["prompt"] == chat[0]["prompt"]
    assert first["completion"][0]["role"] == "assistant"
    jsonl(workspace / "prompts.jsonl", [{"prompt": f"user : {row['prompt']} assistant :", "id": f"c{k}"}
                                        for k, row in enumerate(PROMPTS)])  # fmt: skip
    plain = generate(workspace, "plain", "--engine", "transformers")
    assert plain.returncode == 0, plain.stderr
    assert table(workspace / "plain")[0]["completion"] == first["completion"][0]["content"]
    built = align("pairs", "build", "out", "--judge", "vader", "--output", "pairs", cwd=workspace)
    assert built.returncode == 0, built.stderr
    assert read_pairs(workspace / "pairs")["chosen"][0][0]["role"] == "assistant"


def start_and_kill(command: list[str], cwd: Path, finished: Path, lines: int) -> list[str]:
    """Kill the command (SIGKILL) once ``lines`` prompts are finished; return the ids of the finished prompts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-m", "align.cli", *command], cwd=cwd, env=environment)
    deadline = time.monotonic() + 120
    while not finished.exists() or finished.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = finished.read_text()
    return [json.loads(line)["id"] for line in content[: content.rfind("\n") + 1].splitlines()]


def test_killed_run_repeats_no_finished_prompt(workspace: Path) -> None:
    jsonl(workspace / "prompts.jsonl", [{"id": f"p{k}", "prompt": f"prompt {k}"} for k in range(40)])

    def slow(path: str, body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.05)
        return echo(path, body, number)

    fake = Fake(slow)
    with fake.running() as address:
        command = ["generate", "prompts.jsonl", "--model", "policy", "--base-url", address, "--option", "concurrency=2"]
        finished = start_and_kill([*command, "--output", "out"], workspace, workspace / "out.partial/finished.jsonl", 8)
        assert 8 <= len(finished) < 40 and not (workspace / "out").exists()
        with (workspace / "out.partial" / "finished.jsonl").open("a") as torn:
            torn.write('{"id": "p39", "compl')
        time.sleep(0.3)
        asked_before = len(fake.bodies)
        resumed = align(*command, "--output", "out", cwd=workspace)
        assert resumed.returncode == 0, resumed.stderr
        asked = {body["prompt"] for _, body in fake.bodies[asked_before:]}
        assert asked == {f"prompt {k}" for k in range(40)} - {f"prompt {key[1:]}" for key in finished}
        assert f"{len(finished)} of 40 prompts are finished already" in resumed.stderr
        whole = align(*command, "--output", "whole", cwd=workspace)
        assert whole.returncode == 0, whole.stderr
    assert table(workspace / "out") == table(workspace / "whole")
    assert [row["id"] for row in table(workspace / "out")] == [f"p{k}" for k in range(40)]


def test_killed_run_ends_as_an_uninterrupted_one(workspace: Path) -> None:
    jsonl(workspace / "prompts.jsonl", PROMPTS * 8)
    command = ["generate", "prompts.jsonl", "--model", "policy", "-n", "2", "--max-new-tokens", "40", "--top-p", "0.9",
               "--engine", "transformers"]  # fmt: skip
    small, large = [*command, "--batch-size", "4"], [*command, "--batch-size", "64"]
    start_and_kill([*small, "--output", "out"], workspace, workspace / "out.partial" / "finished.jsonl", 10)
    resumed = align(*large, "--output", "out", cwd=workspace)
    assert resumed.returncode == 0 and "finished already" in resumed.stderr
    assert align(*large, "--output", "whole", cwd=workspace).returncode == 0
    assert table(workspace / "out") == table(workspace / "whole")
    assert not (workspace / "out" / "finished.jsonl").exists()


def test_mistakes_cost_one_line(workspace: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": " "},
        {"prompt": 3},
        {"id": "a", "prompt": "x"},
        {"id": "a", "prompt": "y"},
    ]
    jsonl(workspace / "bad.jsonl", [*rows, {"prompt": [{"role": "user", "content": "hi"}]}])
    bad = align("generate", "bad.jsonl", "--model", "policy", "--output", "out", cwd=workspace)
    assert bad.returncode == 2
    for said in ("row 1: found an empty prompt", "row 2: prompt: found 3", "row 4: found id 'a', which row 3 has too",
                 "row 5: found both text and messages"):  # fmt: skip
        assert said in bad.stderr
    cases = [
        (["--engine", "vlm"], "did you mean `vllm`"),
        (["--format", "csv"], "expected parquet or jsonl"),
        (["--top-p", "0"], "expected a number above 0"),
        (["--option", "dtype"], "--option dtype: expected name=value"),
        (["--engine", "server", "--base-url", "http://127.0.0.1:9/v1", "--option", "attempts=1"], "server-unreachable"),
        (["--model", "nowhere"], "nowhere: cannot be loaded"),
    ]
    for more, said in cases:
        code, _, errors = run_command((*command("out"), *more), workspace)
        assert code == 2 and said in errors and "Traceback" not in errors, errors
    assert not (workspace / "out").exists()
    (workspace / "mine").mkdir()
    (workspace / "mine" / "file").write_text("keep")
    failed = generate(workspace, "mine")
    assert failed.returncode == 2 and "found other files there" in failed.stderr
    assert (workspace / "mine" / "file").read_text() == "keep"
