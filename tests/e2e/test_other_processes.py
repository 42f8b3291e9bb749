"""A training resumes with another number of processes: the same pairs per step, the same order, the same weights."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.helpers.builders import llama_reward, rows
from tests.helpers.command_line import jsonl
from tests.helpers.interrupted import (
    DIES_IN,
    MODULE,
    PAIRS,
    STEPS,
    difference,
    largest_difference,
    prepare,
    run_file,
    taken,
    to_die,
)
from tests.helpers.launching import launched

TOLERANCE = 1e-5


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), pytest.param(1, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["random", pytest.param("group_by_length", marks=pytest.mark.slow)])
def test_another_number_of_processes(tmp_path: Path, before: int, after: int, order: str) -> None:
    """One process is killed in the second epoch; more or fewer processes resume from the checkpoint before it."""
    prepare(tmp_path)
    whole = run_file(tmp_path, "whole", train_sampling_strategy=order)
    done = launched(1, "train", whole, cwd=tmp_path, module=MODULE)
    assert done.returncode == 0, done.stderr
    steps = taken(tmp_path)
    assert sorted(steps) == list(range(1, STEPS + 1))
    for first in (1, 6):
        seen = Counter(pair for step in range(first, first + 5) for pair in steps[step][1])
        assert seen == Counter(f"p{k}" for k in range(PAIRS))
    file = run_file(tmp_path, "moved", train_sampling_strategy=order)
    to_die(tmp_path, rank=before - 1)
    assert launched(before, "train", file, cwd=tmp_path, module=MODULE).returncode != 0
    again = launched(after, "train", file, cwd=tmp_path, module=MODULE)
    assert again.returncode == 0, again.stderr
    assert f"resuming from runs/moved/train-dpo.partial/checkpoints/checkpoint-{DIES_IN - 1}" in again.stderr
    moved = taken(tmp_path)
    assert [moved[step][0] for step in sorted(moved)] == [before] * (DIES_IN - 1) + [after] * (STEPS - DIES_IN + 1)
    assert {step: found for step, (_, found) in moved.items()} == {step: found for step, (_, found) in steps.items()}
    assert difference(tmp_path / "runs" / "whole", tmp_path / "runs" / "moved") < TOLERANCE


def test_other_pairs_a_step_are_refused(tmp_path: Path) -> None:
    """Without ``pairs_per_step`` two processes put twice as many pairs into a step as one."""
    prepare(tmp_path)
    file = run_file(tmp_path, "moved")
    unset = ["--set", "train.pairs_per_step=null", "--set", "train.trainer.per_device_train_batch_size=2"]
    to_die(tmp_path, rank=0)
    assert launched(1, "train", file, *unset, cwd=tmp_path, module=MODULE).returncode != 0
    done = launched(2, "train", file, *unset, cwd=tmp_path, module=MODULE)
    assert done.returncode != 0
    assert "error [pairs-per-step]" in done.stderr and "was written with 2 pairs a step" in done.stderr
    assert "and now a step has 4" in done.stderr


def test_pairs_that_the_processes_cannot_share(tmp_path: Path) -> None:
    prepare(tmp_path)
    file = run_file(tmp_path, "uneven")
    for change, said in (
        ("train.pairs_per_step=3", "found 3, expected a multiple of 2 pairs of a batch in each of 1 process"),
        ("train.trainer.gradient_accumulation_steps=2", "follows from train.pairs_per_step"),
    ):  # fmt: skip
        sets = ["--set", "train.trainer.per_device_train_batch_size=2", "--set", change]
        done = launched(1, "train", file, *sets, "--dry-run", cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_reward_model(tmp_path: Path, before: int, after: int) -> None:
    """Its batches group pairs of similar length within a step, whose pairs stay the same."""
    prepare(tmp_path)
    llama_reward(tmp_path / "backbone")
    jsonl(tmp_path / "heldout.jsonl", [{**row, "prompt": f"not {row['prompt']}"} for row in rows(4)])
    files = [reward_file(tmp_path, name) for name in ("whole", "moved")]
    assert launched(1, "run", files[0], cwd=tmp_path, module=MODULE).returncode == 0
    steps = taken(tmp_path)
    to_die(tmp_path, rank=before - 1)
    assert launched(before, "run", files[1], cwd=tmp_path, module=MODULE).returncode != 0
    again = launched(after, "run", files[1], cwd=tmp_path, module=MODULE)
    assert again.returncode == 0 and f"checkpoint-{DIES_IN - 1}" in again.stderr, again.stderr
    moved = taken(tmp_path)
    assert {step: pairs for step, (_, pairs) in moved.items()} == {step: pairs for step, (_, pairs) in steps.items()}
    folders = [tmp_path / "runs" / name / "reward" / "model" for name in ("whole", "moved")]
    assert largest_difference(*folders) < TOLERANCE


def reward_file(folder: Path, name: str) -> str:
    """Write a run that ends with its reward model: ``STEPS`` steps of four pairs, one per batch."""
    fields = {
        "bf16": False, "gradient_checkpointing": False, "max_steps": STEPS, "learning_rate": 1e-3,
        "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    reward = {"model": "backbone", "max_length": 64, "pairs_per_step": 4, "trainer": fields}
    reward |= {"eval_pairs": {"path": "heldout.jsonl"}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "pairs": {"path": "pairs.jsonl"}, "reward": reward}))
    return file.name
