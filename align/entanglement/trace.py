"""Entanglement over a training, from its start to its last checkpoint: when pairs are entangled, what predicts it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.entanglement.conditions import FALLS
from align.entanglement.summary import RARE, SCREENS, rank_correlation, summarize
from align.errors import DataError

CHECKPOINT = "checkpoint-"
START = "start"
"""Folder of a training with the adapter as it was before the first step."""


def checkpoints_of(training: Path) -> list[tuple[int, Path]]:
    """List (optimizer step, folder) of the saved checkpoints of a training, in order.

    Args:
        training: folder of a ``train-<method>`` stage.

    Raises:
        DataError: the training saved no checkpoint.
    """
    checkpoints = sorted(
        (int(folder.name.removeprefix(CHECKPOINT)), folder)
        for folder in (training / "checkpoints").glob(f"{CHECKPOINT}*")
        if folder.is_dir() and folder.name.removeprefix(CHECKPOINT).isdigit()
    )
    if not checkpoints:
        raise DataError(
            f"{training / 'checkpoints'}: no checkpoint to measure",
            code="trace-checkpoints",
            hint="train with `train.trainer: {save_strategy: steps, save_steps: 20}`",
        )
    return checkpoints


def trajectory(steps: Sequence[int], tables: Sequence[Dataset]) -> dict[str, Any]:
    """Combine measurements of the same pairs at several steps.

    Args:
        steps: optimizer steps, ascending.
        tables: rows of ``measure_entanglement`` at each step, the same pairs in the same order.

    Returns:
        ``points`` (one dictionary per step), ``intervals`` (between adjacent steps: how the predicted and the realized
        change of the chosen log-probs agree), ``first_step_entangled`` and ``first_step_chosen_falls`` (the first
        measured step at which more than ``RARE`` of the pairs are entangled, or would fall), ``chosen_fell`` (the share
        of pairs whose chosen log-prob is lower at the last step than at the first), ``peak_step`` (the step with the
        highest mean chosen log-prob) and ``screening`` (rank correlation of each cheap score at the first step with the
        change to the last).
    """
    points = [_point(step, table) for step, table in zip(steps, tables, strict=True)]
    levels = [point["chosen_change"] for point in points]
    first = {
        name: next((point["step"] for point in points if point[name] > RARE), None)
        for name in ("entangled", "chosen_falls")
    }
    change = _column(tables[-1], "logp_chosen") - _column(tables[0], "logp_chosen")
    names = ("cosine", *SCREENS)
    return {
        "points": points,
        "intervals": [_interval(*pair) for pair in zip(steps, tables, steps[1:], tables[1:], strict=False)],
        "first_step_entangled": first["entangled"],
        "first_step_chosen_falls": first["chosen_falls"],
        "chosen_fell": float((change < 0).mean()),
        "peak_step": steps[int(np.argmax(levels))],
        "screening": {
            name: {"cosine": rank_correlation(_column(tables[0], name), _column(tables[0], "cosine")),
                   "chosen_change": rank_correlation(_column(tables[0], name), change)}
            for name in names
        },
    }  # fmt: skip


def sentence(found: dict[str, Any], method: str) -> str:
    """Summarize a trajectory in one sentence: what single steps would do, and what the training did."""
    points = found["points"]
    start, last, worst = points[0], points[-1], max(points, key=lambda point: point["entangled"])
    end = f"the chosen responses are {last['chosen_change']:+.1f} nats from the reference after {last['step']} steps"
    if len(points) > 1:
        end += f", and {found['chosen_fell']:.0%} of them fell since step {start['step']}"
    first = found["first_step_entangled"]
    if first is None:
        return f"{method}: at no measured step were more than {RARE:.0%} of the pairs entangled; {end}."
    return (
        f"{method}: pairs are entangled from step {first} on, most of them at step {worst['step']} "
        f"({worst['entangled']:.0%}; a step would lower the chosen response of {worst['chosen_falls']:.0%}); {end}."
    )


def _point(step: int, table: Dataset) -> dict[str, float]:
    summary = summarize(table)
    return {
        "step": step,
        "entangled": summary["entangled"]["value"],
        "chosen_falls": summary["chosen_falls"]["value"],
        "cosine": summary["cosine"]["median"],
        "norm_ratio": summary["norm_ratio"]["median"],
        "chosen_change": float(_column(table, "logp_chosen_change").mean()),
        "rejected_change": float(_column(table, "logp_rejected_change").mean()),
    }


def _interval(start: int, before: Dataset, end: int, after: Dataset) -> dict[str, Any]:
    """Compare the pairs whose step at ``start`` would lower the chosen response with the changes until ``end``."""
    realized = _column(after, "logp_chosen") - _column(before, "logp_chosen")
    falls = np.isin(np.asarray(before["verdict"], dtype=object), FALLS)
    return {
        "from": start,
        "to": end,
        "fell_of_predicted_to_fall": float((realized[falls] < 0).mean()) if falls.any() else None,
        "fell_of_others": float((realized[~falls] < 0).mean()) if (~falls).any() else None,
        "prediction_against_change": rank_correlation(_column(before, "step_chosen"), realized),
    }


def _column(table: Dataset, name: str) -> np.ndarray:
    return np.asarray(table[name], dtype=np.float64)
