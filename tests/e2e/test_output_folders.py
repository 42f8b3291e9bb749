"""A command writes only into folders of its own results: those of another command are refused and unchanged."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bad_input_makers import message, run_command, snapshot
from tests.helpers.builders import causal, llama_reward, rows

TABLE = "pairs.jsonl"
POLICY = ("one", "--reference", "base", "--prompts", "prompts.jsonl", "--judge", "vader", "--max-new-tokens", "3")
WRITERS = {
    "reward score": ("reward", "score", TABLE, "--model", "rm"),
    "data check": ("data", "check", TABLE, "--drop-invalid"),
    "filter run": ("filter", "run", TABLE, "--embeddings", "e.npy"),
    "entangle report": ("entangle", "report", TABLE, "--model", "base", "--shown", "0"),
    "entangle check": ("entangle", "check", TABLE, "--model", "base"),
    "eval reward": ("eval", "reward", *POLICY),
    "eval reward-model": ("eval", "reward-model", TABLE, "--model", "rm"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outputs")
    causal(made / "base")
    causal(made / "one", seed=1)
    llama_reward(made / "rm")
    lines = [json.dumps(row) + "\n" for row in rows(8)]
    (made / TABLE).write_text("".join(lines))
    (made / "others.jsonl").write_text("".join(lines[:5]))
    (made / "prompts.jsonl").write_text('{"prompt": "the film is"}\n{"prompt": "a plot is"}\n')
    np.save(made / "e.npy", np.eye(8, dtype=np.float32))
    return made


def done(folder: Path, *command: str) -> str:
    code, _, errors = run_command(command, folder)
    assert code == 0, errors
    return errors


def refused(folder: Path, output: str, *command: str) -> None:
    before = snapshot(folder / output)
    code, _, errors = run_command((*command, "--output", output), folder)
    assert code == 2 and message(errors).startswith("error [output-folder] "), errors
    assert "an earlier result of the same command" in errors and "Traceback" not in errors
    assert snapshot(folder / output) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_finished_stage_is_not_written_into(folder: Path, writer: str) -> None:
    """The manifest would vouch for a table that another command wrote."""
    build = ("pairs", "build", "sampled.jsonl", "--judge", "vader", "--output", "built")
    rated = [{"id": "a", "prompt": "it is", "sample": k, "completion": (" good", " bad")[k]} for k in range(2)]
    (folder / "sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    done(folder, *build)
    refused(folder, "built", *WRITERS[writer])
    assert "up to date, skipped" in done(folder, *build)


@pytest.mark.parametrize("writer", ["filter run", "entangle report", "eval reward"])
def test_another_page_is_not_replaced(folder: Path, writer: str) -> None:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "report.html").write_text("the page of a run")
    refused(folder, "run", *WRITERS[writer])


def test_pages_of_their_own_are_replaced_by_the_same_command_alone(folder: Path) -> None:
    for name in ("filter run", "entangle report", "eval reward"):
        command = (*WRITERS[name], "--output", f"of {name}")
        done(folder, *command)
        done(folder, *command)
    refused(folder, "of filter run", *WRITERS["entangle report"])
    refused(folder, "of entangle report", *WRITERS["filter run"])
    refused(folder, "of entangle report", *WRITERS["eval reward"])
    refused(folder, "of eval reward", *WRITERS["filter run"])


def test_a_reward_model_and_policies_are_evaluated_into_one_folder(folder: Path) -> None:
    judge = ("eval", "reward-model", "--model", "rm", "--output", "eval")
    policies = (*WRITERS["eval reward"], "--output", "eval")
    done(folder, *judge, TABLE)
    done(folder, *policies)
    scores = snapshot(folder / "eval" / "scores")
    assert len([name for name in scores if name.endswith("scores.parquet")]) == 2
    done(folder, *judge, "others.jsonl")
    assert snapshot(folder / "eval" / "scores") == scores
    assert len(re.findall("scores of .*: up to date, skipped", done(folder, *policies))) == 2
