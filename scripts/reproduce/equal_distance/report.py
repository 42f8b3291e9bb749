"""Gold reward at equal KL by interpolation between marks, and differences to DPO over seeds with Student's t."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import t

from scripts.bootstrap import Estimate
from scripts.reproduce.equal_distance.design import ARMS, BASELINE, OTHERS, TARGET
from scripts.tables import table

ERROR_RATE = 0.05
"""Familywise error rate of the differences at ``TARGET``, by Holm's procedure."""


def gain_at(cell: Mapping[str, Any], reference: Sequence[float], target: float) -> float | None:
    """Gold reward minus the reference's at this KL: linear in sqrt(KL) between the two marks around it.

    The reference is the point at KL 0. None if no mark lies at ``target`` or beyond it.

    Args:
        cell: what ``run_cell`` returns.
        reference: mean reward of the reference on each prompt of the block.
        target: KL, nats.
    """
    start = float(np.mean(reference))
    points = [(0.0, 0.0)]
    points += [(float(np.sqrt(np.mean(mark["kl"]))), float(np.mean(mark["reward"])) - start) for mark in cell["marks"]]
    wanted = float(np.sqrt(target))
    for (near, low), (far, high) in pairwise(points):
        if near < wanted <= far:
            return low + (high - low) * (wanted - near) / (far - near)
    return None


def by_seed(
    cells: Sequence[Mapping[str, Any]], references: Mapping[int, Sequence[float]], target: float
) -> dict[str, dict[int, float]]:
    """Method -> seed -> gain at this KL, the mean over the seed's label draws; seeds of which a draw stays nearer are
    left out."""
    found: dict[str, dict[int, list[float | None]]] = {}
    for cell in cells:
        gain = gain_at(cell, references[cell["block"]], target)
        found.setdefault(cell["method"], {}).setdefault(cell["seed"], []).append(gain)
    return {
        method: {seed: float(np.mean(gains)) for seed, gains in seeds.items() if None not in gains}  # type: ignore[arg-type]
        for method, seeds in found.items()
    }


def difference(
    own: Mapping[int, float], base: Mapping[int, float], *, paired: bool
) -> tuple[float, float, float] | None:
    """Mean difference, its standard error and the degrees of freedom of Student's t; None with too few seeds.

    ``paired``: over the seeds that both have. Else Welch's: all seeds of both.
    """
    if paired:
        values = np.array([own[seed] - base[seed] for seed in own if seed in base])
        if len(values) < 2:
            return None
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), float(len(values) - 1)
    if min(len(own), len(base)) < 2:
        return None
    first, second = np.array(list(own.values())), np.array(list(base.values()))
    parts = np.array([first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)])
    freedom = parts.sum() ** 2 / (parts**2 / [len(first) - 1, len(second) - 1]).sum() if parts.sum() else np.inf
    return float(first.mean() - second.mean()), float(np.sqrt(parts.sum())), float(freedom)


def interval(found: tuple[float, float, float], count: int, level: float = ERROR_RATE) -> Estimate:
    """The ``1 - level`` interval of a ``difference`` over ``count`` seeds."""
    mean, error, freedom = found
    half = float(t.ppf(1 - level / 2, freedom)) * error
    return Estimate(mean, mean - half, mean + half, count)


def p_value(found: tuple[float, float, float]) -> float:
    """Two-sided p-value of a ``difference``."""
    mean, error, freedom = found
    return float(2 * t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)


def summarize(cells: Sequence[Mapping[str, Any]], references: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """A row per method and KL: gain, difference to DPO with interval, Holm's p at ``TARGET``, cells that reach it."""
    rows: list[dict[str, Any]] = []
    for target in (TARGET, *OTHERS):
        gains = by_seed(cells, references, target)
        for method in ARMS:
            own, all_seeds = gains.get(method, {}), {c["seed"] for c in cells if c["method"] == method}
            row: dict[str, Any] = {"kl": target, "method": method, "seeds": len(all_seeds), "reached": len(own)}
            row["gain"] = float(np.mean(list(own.values()))) if own else None
            if method != BASELINE:
                found = difference(own, gains.get(BASELINE, {}), paired=ARMS[method].paired)
                row["over_dpo"] = found and interval(found, len(own)).to_dict()
                row["p"] = found and p_value(found)
            rows.append(row)
    _correct([row for row in rows if row["kl"] == TARGET and row.get("p") is not None])
    return rows


def _correct(rows: list[dict[str, Any]]) -> None:
    """Replace p by Holm's (1979)."""
    worst = 0.0
    for number, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        worst = max(worst, min(1.0, (len(rows) - number) * row["p"]))
        row["p"] = worst


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/results.md."""
    head = ["KL", "method", "seeds", "of them reach this KL", "gain over the reference", "minus DPO", "half-width", "p"]
    body = []
    for row in rows:
        less = row.get("over_dpo")
        cells = [f"{row['kl']:g}", row["method"], str(row["seeds"]), str(row["reached"])]
        cells.append("" if row["gain"] is None else f"{row['gain']:+.2f}")
        cells.append("" if not less else f"{less['value']:+.2f} ({less['low']:+.2f} to {less['high']:+.2f})")
        cells.append("" if not less else f"{(less['high'] - less['low']) / 2:.2f}")
        cells.append(f"{row['p']:.2f}" if row.get("p") is not None else "")
        body.append(cells)
    return table(head, body)
