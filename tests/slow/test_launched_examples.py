"""The examples under `accelerate launch`: two processes with half of the batch each take the steps of one."""

import json
from pathlib import Path

import pytest

from tests.helpers.builders import rows
from tests.helpers.command_line import jsonl
from tests.helpers.launching import launched
from tests.helpers.python_page import write_page_folder
from tests.test_examples import BACKBONE, POLICY

pytestmark = pytest.mark.slow
STEPS = 4
SAME = ["--learning_rate", "1e-2", "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "steps",
        "--save_steps", str(STEPS), "--bf16", "false", "--use_cpu", "--report_to", "none", "--max_length", "64",
        "--gradient_checkpointing", "false", "--lr_scheduler_type", "constant"]  # fmt: skip


def losses(processes: int, example: str, model: str, folder: Path) -> list[float]:
    """Loss of each step, from the state that the last checkpoint has."""
    output = f"{example}-{processes}"
    done = launched(
        processes, "--model_name_or_path", model, "--dataset_name", "pairs.jsonl", "--output_dir", output,
        "--per_device_train_batch_size", str(4 // processes), *SAME, cwd=folder, module=f"examples.{example}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / output / "README.md").exists()
    state = json.loads((folder / output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(("example", "model"), [("dpo", POLICY), ("reward_model", BACKBONE)])
def test_two_processes_take_the_steps_of_one(example: str, model: str, tmp_path: Path) -> None:
    write_page_folder(tmp_path)
    jsonl(tmp_path / "pairs.jsonl", [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows(STEPS * 4)])
    one, two = (losses(processes, example, model, tmp_path) for processes in (1, 2))
    assert len(one) == STEPS and len(set(one)) > 1
    assert two == pytest.approx(one, abs=1e-5)
