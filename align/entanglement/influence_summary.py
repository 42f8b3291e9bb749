"""From the influence of each pair at each checkpoint to one table, sums with intervals, and the pairs to read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from align.data.text import plain
from align.entanglement.influence import ADAMW, PARTS, SGD, column, with_whole
from align.errors import DataError
from align.stats import FEWEST_UNITS, above, below, mean_interval, share_interval

LENGTH = "length"
"""Name of the grouping by the lengths of the two responses."""
SIMILAR = 0.1
"""Responses whose token counts differ by at most this share of the longer one count as equally long."""
GROUPINGS = ("source", "group")
"""Columns whose values are summed over wherever the pairs have them."""
SHOWN_VALUES = 20
"""Values of a column that are listed, those with the most pairs."""
FEW_HELD_OUT = 100
"""Below so many held-out pairs, the influence mostly shows the chance of their sample."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model that is measured."""

    name: str
    step: int | None
    """Optimizer step of a checkpoint; None: no checkpoint."""
    model: str
    reference: str | None
    rate: float
    """Learning rate by which its influence counts."""
    adam: str | None
    """Why there is no state of AdamW; None where there is the file of one."""


Measured = tuple[Dataset, Mapping[str, Any]]
"""Columns of ``InfluenceMeasurement``, and ``groups`` with name, pairs and loss of each held-out group."""


def combine(measured: Sequence[Measured], points: Sequence[Point], pairs: Dataset, tokens: Dataset) -> Dataset:
    """The influence of each pair, summed over the points with their learning rates.

    Args:
        measured: the same pairs at each point.
        points: the points.
        pairs: the rows of the pair table.
        tokens: the same rows as token ids.

    Returns:
        The columns of ``pairs`` and the numbers of tokens, then those of ``column``; the kind ``ADAMW`` only if every
        point has it.
    """
    tables = [
        with_whole(table, {group["name"]: group["pairs"] for group in held["groups"]}) for table, held in measured
    ]
    names = [name for name in tables[0].column_names if name.startswith((SGD, ADAMW))]
    names = [name for name in names if all(name in table.column_names for table in tables)]
    summed = {
        name: np.sum([p.rate * np.asarray(table[name]) for p, table in zip(points, tables, strict=True)], axis=0)
        for name in names
    }
    added = {f"tokens_{side}": [len(ids) for ids in tokens[f"{side}_ids"]] for side in ("chosen", "rejected")}
    added |= {name: summed[name] for name in sorted(names, key=lambda name: ("@" in name, not name.startswith(SGD)))}
    pairs = pairs.remove_columns([name for name in added if name in pairs.column_names])
    for name, values in added.items():
        pairs = pairs.add_column(name, values)
    return pairs


def _sizes(held: Mapping[str, Any]) -> dict[str, int]:
    return {group["name"]: group["pairs"] for group in held["groups"]}


def summarize(
    table: Dataset, measured: Sequence[Measured], points: Sequence[Point], by: Sequence[str], shown: int
) -> dict[str, Any]:
    """Sums over all pairs and over the values of columns, intervals clustered by prompt, and the pairs at both ends.

    Args:
        table: what ``combine`` returned.
        measured: see there.
        points: see there.
        by: further columns to sum over.
        shown: pairs at either end.

    Raises:
        DataError: the pairs have no column of ``by``.
    """
    missing = [name for name in by if name not in table.column_names]
    if missing:
        raise DataError(
            f"--by {missing[0]}: found no such column in the pairs, expected one of "
            f"{', '.join(name for name in table.column_names if not name.startswith((SGD, ADAMW)))}",
            code="data-column",
        )
    kind = ADAMW if ADAMW in table.column_names else SGD
    values = np.asarray(table[kind])
    prompts = np.array([json.dumps(prompt, sort_keys=True, default=str) for prompt in table["prompt"]])
    groupings: dict[str, list[str]] = {
        name: ["none" if value is None else str(value) for value in table[name]]
        for name in dict.fromkeys((*GROUPINGS, *by))
        if name in table.column_names
    }
    groupings[LENGTH] = [_length(*both) for both in zip(table["tokens_chosen"], table["tokens_rejected"], strict=True)]
    groups = [
        group | {"influence": _sums(table, kind, prompts, str(group["name"]))} for group in measured[-1][1]["groups"]
    ]
    order = np.argsort(values)
    raising, lowering = ([int(k) for k in some if sign * values[k] > 0]
                         for sign, some in ((1, order[::-1][:shown]), (-1, order[:shown])))  # fmt: skip
    found = {
        "kind": kind,
        "pairs": len(table),
        "held_out_pairs": sum(group["pairs"] for group in groups),
        "few_held_out": FEW_HELD_OUT,
        "unit": "change of the held-out loss" + ("" if points[0].step is not None else " per unit of learning rate"),
        "all": _sums(table, kind, prompts),
        "raises": share_interval((values > 0).astype(float), clusters=prompts).to_dict(),
        "groups": groups,
        "by": {name: _by(table, kind, prompts, np.array(labels)) for name, labels in groupings.items()},
        "points": [_point(point, one, kind) for point, one in zip(points, measured, strict=True)],
        "raising": [_text(table, k, kind) for k in raising],
        "lowering": [_text(table, k, kind) for k in lowering],
    }
    return {"sentence": sentence(found), **found}


def sentence(found: Mapping[str, Any]) -> str:
    """What the pairs do to the held-out loss, in one or two sentences; only what the intervals support."""
    share, total = found["raises"], found["all"]["sum"]
    interval = "" if share["low"] is None else f" (95% interval {share['low']:.0%} to {share['high']:.0%})"
    text = (
        f"To first order, steps on {share['value']:.0%} of the {found['pairs']} pairs{interval} raise the held-out loss"
    )
    if above(total, 0) or below(total, 0):
        text += f", and all together {'raise' if total['value'] > 0 else 'lower'} it."
    else:
        text += "; whether all together raise or lower it is not decided by these pairs."
    named = [
        f"{name} {row['value']}" for name, rows in found["by"].items() for row in rows if above(row["sum"], 0)
    ]  # fmt: skip
    return text + (f" Raised by: {', '.join(named[:5])}." if named else "")


def _sums(table: Dataset, kind: str, prompts: np.ndarray, group: str | None = None, of: Any = slice(None)) -> Any:
    """Sum over pairs with its interval over prompts, and its two parts."""
    names = [kind + part if group is None else column(kind, part, group) for part in PARTS]
    values = [np.asarray(table[name])[of] for name in names]
    clusters = prompts[of]
    total = mean_interval(values[0], clusters=clusters).to_dict()
    scaled = {key: None if total[key] is None else total[key] * total["n"] for key in ("value", "low", "high")}
    return {
        "sum": total | scaled,
        "chosen": float(values[1].sum()),
        "rejected": float(values[2].sum()),
        "prompts": len(set(clusters)),
    }


def _by(table: Dataset, kind: str, prompts: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Sums over the pairs of each value, the largest sum first; values with fewest pairs are left out."""
    names, counts = np.unique(labels, return_counts=True)
    names = names[np.argsort(-counts, kind="stable")][:SHOWN_VALUES]
    rows = [
        {"value": str(name), "pairs": int((labels == name).sum()), "few": False}
        | _sums(table, kind, prompts, of=labels == name)
        for name in names
    ]
    for row in rows:
        row["few"] = row["prompts"] < FEWEST_UNITS
    return sorted(rows, key=lambda row: -row["sum"]["value"])


def _length(chosen: int, rejected: int) -> str:
    if abs(chosen - rejected) <= SIMILAR * max(chosen, rejected):
        return "about equally long"
    return "chosen longer" if chosen > rejected else "rejected longer"


def _point(point: Point, measured: Measured, kind: str) -> dict[str, Any]:
    table, held = measured
    sizes = _sizes(held)
    total = sum(sizes.values())
    return {
        "name": point.name,
        "step": point.step,
        "learning_rate": point.rate,
        "held_out_loss": sum(group["pairs"] * group["loss"] for group in held["groups"]) / total,
        "sum": point.rate * float(np.sum(with_whole(table, sizes)[kind])),
    }


def _text(table: Dataset, place: int, kind: str) -> dict[str, Any]:
    row = table[place]
    shown = {name: row.get(name) for name in ("id", "source", "group", "tokens_chosen", "tokens_rejected")}
    texts = {name: plain(row[name]) for name in ("prompt", "chosen", "rejected")}
    return shown | texts | {"influence" + part: row[kind + part] for part in PARTS}
