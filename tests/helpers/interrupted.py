"""Small trainings that are interrupted and resumed: their run file, the pairs of their steps, their weights."""

import json
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.builders import causal
from tests.helpers.builders import rows as pairs
from tests.helpers.command_line import jsonl

MODULE = "tests.helpers.dying_once_cli"
PAIRS, PAIRS_PER_STEP = 18, 4
"""The last step of an epoch has two pairs."""
STEPS, DIES_IN = 12, 8
"""An epoch has five steps; three of the second epoch are left."""


def prepare(folder: Path) -> None:
    """Write a policy and its pairs."""
    causal(folder / "policy")
    jsonl(folder / "pairs.jsonl", pairs(PAIRS))


def run_file(folder: Path, name: str, **trainer: Any) -> str:
    """Write a run of ``STEPS`` steps of ``PAIRS_PER_STEP`` pairs, one per batch, with a checkpoint after each."""
    fields = {
        "bf16": False, "gradient_checkpointing": False, "max_steps": STEPS, "learning_rate": 1e-3,
        "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    train = {"model": "policy", "methods": {"dpo": {"loss": "dpo"}}, "trainer": fields | trainer}
    train |= {"pairs_per_step": PAIRS_PER_STEP}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "pairs": {"path": "pairs.jsonl"}, "train": train}))
    return file.name


def to_die(folder: Path, *, rank: int, step: int = DIES_IN, agent: bool = False) -> None:
    """Request that the process with this rank dies once, in this step."""
    (folder / "dies.json").write_text(json.dumps({"rank": rank, "step": step, "agent": agent}))


def taken(folder: Path) -> dict[int, tuple[int, list[str]]]:
    """Step -> number of processes that last made it, and its pairs in order over the ranks; deletes the records."""
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    file = folder / "steps.jsonl"
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        lines[entry["step"]].append(entry)
    file.unlink()
    found = {}
    for step, entries in sorted(lines.items()):
        processes = entries[-1]["processes"]
        last = sorted(entries[-processes:], key=lambda entry: entry["rank"])
        assert [entry["rank"] for entry in last] == list(range(processes))
        batches = zip_longest(*(entry["pairs"] for entry in last))
        found[step] = (processes, [pair for batch in batches for pair in batch if pair is not None])
    return found


def difference(one: Path, other: Path) -> float:
    """Largest difference between the policies of two runs."""
    return largest_difference(*(run / "train-dpo" / "model" for run in (one, other)))


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference between the weights of two model folders; 0 if they are equal bit for bit."""
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    return max(0.0 if torch.equal(value, right[name]) else float((value - right[name]).abs().max())
               for name, value in left.items())  # fmt: skip
