"""Tiny runs with every kind of stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.builders import bert_reward, causal, rows
from tests.helpers.command_line import jsonl

SMALL = {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}


def write_run(folder: Path, methods: Sequence[str], trainer: dict[str, Any], **sample: Any) -> Path:
    """Write models, tables and ``run.yaml`` into ``folder``; returns the run file.

    Args:
        folder: exists.
        methods: losses, each trained with its defaults.
        trainer: fields of both trainers, next to ``SMALL``.
        sample: more fields of the section ``sample``.
    """
    causal(folder / "policy")
    bert_reward(folder / "backbone")
    table = [{name: value for name, value in row.items() if name != "margin"} for row in rows(24)]
    jsonl(folder / "pairs.jsonl", table)
    jsonl(folder / "heldout.jsonl", [{**row, "prompt": f"not {row['prompt']}"} for row in table[:8]])
    jsonl(folder / "prompts.jsonl", [{"prompt": f"the {row['prompt']}"} for row in table[:10]])
    fields = {**SMALL, **trainer}
    run = {
        "name": "tiny",
        "reward": {
            "model": "backbone", "folds": 2, "max_length": 64, "trainer": fields | {"learning_rate": 1e-3},
            "pairs": {"path": "pairs.jsonl"}, "eval_pairs": {"path": "heldout.jsonl"},
        },
        "sample": {"prompts": "prompts.jsonl", "max_new_tokens": 6, **sample},
        "train": {
            "model": "policy", "methods": {name: {"loss": name} for name in methods},
            "trainer": fields | {"learning_rate": 1e-2}, "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        },
        "evaluate": {"prompts": "prompts.jsonl", "max_new_tokens": 6, "judge": "vader"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def every_stage(folder: Path) -> Path:
    """A run that saves a checkpoint every second step; its constant rate shows a step too many in the weights."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    return write_run(folder, ("beta_dpo", "madpo"), {"max_steps": 9, "lr_scheduler_type": "constant", **saving})
