"""Table and plot of the policy study, from its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.stats import ends
from scripts.bootstrap import Estimate, bootstrap_mean, gain_per_root_kl
from scripts.figures import pyplot, save
from scripts.reproduce.crossed_effects import crossed_gain_per_root_kl, crossed_mean, crossed_p
from scripts.reproduce.policy_protocol.judging import same_prompts
from scripts.tables import table

BASELINE, MADPO = "dpo", "madpo"
ERROR_RATE = 0.05
"""Familywise error rate of the primary comparisons."""
NO_WORSE = -0.1
"""A difference whose complete interval lies above this is called no worse."""
Cells = Sequence[dict[str, Any]]


def summarize(cells: Cells, references: Cells) -> list[dict[str, Any]]:
    """A row per quality and method, over the seeds that every method of the quality has.

    Args:
        cells: test cells.
        references: the reference's test cells, one per seed.
    """
    rows = []
    for quality, (found, origin, seeds) in _by_quality(cells, references).items():
        start = _by_seed(origin, seeds, "1", "reward")
        untrained = _frontier(origin, seeds, start)
        rows += [_row(quality, method, found, start, seeds) | {"reference_frontier": untrained} for method in found]
    return rows


def _by_quality(
    cells: Cells, references: Cells
) -> dict[str, tuple[dict[str, dict[int, Any]], dict[int, Any], list[int]]]:
    """Quality -> (method -> seed -> cell, the reference's cells by seed, the seeds that every method has)."""
    origin, made = {cell["seed"]: cell for cell in references}, {}
    for quality in dict.fromkeys(cell["quality"] for cell in cells):
        here = [cell for cell in cells if cell["quality"] == quality]
        methods = dict.fromkeys(cell["method"] for cell in here)
        found = {method: {cell["seed"]: cell for cell in here if cell["method"] == method} for method in methods}
        same_prompts([part for cell in [*here, *origin.values()] for part in cell["decoded"].values()])
        seeds = sorted(set(origin).intersection(*found.values()))
        if seeds:
            made[quality] = found, origin, seeds
    return made


def primary(summary: Sequence[dict[str, Any]], cells: Cells, references: Cells) -> list[dict[str, Any]]:
    """A row per quality: MADPO minus DPO with Holm's correction over the qualities, and its verdict.

    ``verdict``: "better" if the corrected interval lies above 0, every seed agrees in sign and MADPO's gain per root KL
    is not lower than DPO's; "worse" if the interval lies below 0 and every seed agrees; "no worse" if the interval lies
    above ``NO_WORSE``; else "no difference seen". ``baseline_gains``: whether the interval of DPO's own gain over the
    reference lies above 0; if it does not, this quality cannot tell methods apart. ``summary``: what ``summarize``
    returns for the same cells.
    """
    tables, rows = {}, {(row["quality"], row["method"]): row for row in summary}
    for quality, (found, _, seeds) in _by_quality(cells, references).items():
        if {BASELINE, MADPO} <= set(found) and len(seeds) > 1:
            reward, base = (_by_seed(found[method], seeds, "1", "reward") for method in (MADPO, BASELINE))
            tables[quality] = reward - base
    made = []
    for quality, (estimate, p) in holm(tables).items():
        dpo, madpo = rows[quality, BASELINE], rows[quality, MADPO]
        ratios = madpo["gain_per_root_kl"], dpo["gain_per_root_kl"]
        made.append({
            "quality": quality,
            "baseline_gains": dpo["gain"]["low"] > 0,
            "over_dpo": estimate.to_dict(),
            "p": p,
            "verdict": _verdict(estimate, tables[quality].mean(axis=1), *ratios),
        })  # fmt: skip
    return made


def holm(tables: Mapping[str, np.ndarray]) -> dict[str, tuple[Estimate, float]]:
    """Mean with corrected interval, and corrected p (Holm, 1979), of each table [seeds, prompts].

    Each interval has the level of the Holm step that decided its table, so that exactly the intervals whose corrected p
    is below ``ERROR_RATE`` exclude 0.
    """
    alone = {name: crossed_p(table) for name, table in tables.items()}
    made: dict[str, tuple[Estimate, float]] = {}
    p, level = 0.0, ERROR_RATE
    for number, name in enumerate(sorted(alone, key=lambda name: alone[name])):
        if p < ERROR_RATE:
            level = ERROR_RATE / (len(tables) - number)
        p = max(p, min(1.0, (len(tables) - number) * alone[name]))
        made[name] = crossed_mean(tables[name], confidence=1 - level), p
    return {name: made[name] for name in tables}


def _verdict(
    difference: Estimate, by_seed: np.ndarray, ratio: dict[str, float] | None, base: dict[str, float] | None
) -> str:
    if difference.low > 0 and (by_seed > 0).all() and ratio and base and ratio["value"] >= base["value"]:
        return "better"
    if difference.high < 0 and (by_seed < 0).all():
        return "worse"
    return "no worse" if difference.low > NO_WORSE else "no difference seen"


def _row(
    quality: str, method: str, found: dict[str, dict[int, Any]], start: np.ndarray, seeds: list[int]
) -> dict[str, Any]:
    """The row of a method. Intervals are over seeds and prompts; ``over_dpo_of_these_policies`` is over prompts.

    ``start``: the reference's gold rewards [seeds, prompts].
    """
    reward, kl = (_by_seed(found[method], seeds, "1", name) for name in ("reward", "kl"))
    row: dict[str, Any] = {
        "quality": quality,
        "method": method,
        "seeds": len(seeds),
        "parameters": found[method][seeds[0]]["parameters"],
        "cells": [found[method][seed]["key"] for seed in seeds],
        "reference": float(start.mean()),
        "reward": crossed(reward).to_dict(),
        "gain": crossed(reward - start).to_dict(),
        "gain_by_seed": (reward - start).mean(axis=1).round(4).tolist(),
        "kl": crossed(kl).to_dict(),
    }
    gain = reward - start
    ratio = crossed_gain_per_root_kl(gain, kl) if len(seeds) > 1 else gain_per_root_kl(gain[0], kl[0], seed=0)
    row["gain_per_root_kl"] = ratio and ratio.to_dict()
    if BASELINE in found and method != BASELINE:
        base = _by_seed(found[BASELINE], seeds, "1", "reward")
        row["over_dpo"] = crossed(reward - base).to_dict()
        row["over_dpo_of_these_policies"] = bootstrap_mean((reward - base).mean(axis=0), seed=0).to_dict()
        row["over_dpo_by_seed"] = (reward - base).mean(axis=1).round(4).tolist()
        row["wins_over_dpo"] = crossed((reward > base) + 0.5 * (reward == base)).to_dict()
    row["frontier"] = _frontier(found[method], seeds, start)
    return row


def _frontier(cells: Mapping[int, Any], seeds: list[int], start: np.ndarray) -> list[dict[str, Any]]:
    """KL, gold reward and its gain over ``start`` [seeds, prompts] at each decoding temperature."""
    made = []
    for heat in cells[seeds[0]]["decoded"]:
        reward, kl = (_by_seed(cells, seeds, heat, name) for name in ("reward", "kl"))
        made.append({
            "temperature": float(heat),
            "kl": float(kl.mean()),
            "reward": crossed(reward).to_dict(),
            "gain": crossed(reward - start).to_dict(),
        })  # fmt: skip
    return made


def crossed(table: np.ndarray) -> Estimate:
    """``crossed_mean`` of a table [seeds, prompts]; with a single seed the interval is over prompts only."""
    return crossed_mean(table) if len(table) > 1 else bootstrap_mean(table[0], seed=0)


def _by_seed(cells: Mapping[int, Any], seeds: list[int], heat: str, name: str) -> np.ndarray:
    """One number of the cells as a table [seeds, prompts]."""
    return np.array([cells[seed]["decoded"][heat][name] for seed in seeds], dtype=np.float64)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/results.md."""
    head = ["quality", "method", "chosen", "seeds", "gain over the reference", "minus DPO", "by seed"]
    head += ["of these policies", "wins against DPO", "KL", "gain per sqrt(2 KL)"]
    body = []
    for row in rows:
        chosen = ", ".join(f"{name} {value:g}" for name, value in row["parameters"].items())
        by_seed = ", ".join(f"{value:+.2f}" for value in row.get("over_dpo_by_seed", []))
        cells = [
            row["quality"],
            row["method"],
            chosen,
            str(row["seeds"]),
            shown(row["gain"], "+"),
            shown(row.get("over_dpo"), "+"),
            by_seed,
            shown(row.get("over_dpo_of_these_policies"), "+"),
        ]
        cells += [shown(row.get("wins_over_dpo")), shown(row["kl"]), shown(row["gain_per_root_kl"])]
        body.append(cells)
    return table(head, body)


def primary_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of primary comparisons in docs/results.md; empty without comparisons."""
    if not rows:
        return ""
    head = ["quality", "DPO gains", "MADPO minus DPO, corrected", "p, corrected", "verdict"]
    body = []
    for row in rows:
        gains = "yes" if row["baseline_gains"] else "not seen"
        body.append([row["quality"], gains, shown(row["over_dpo"], "+"), f"{row['p']:.2f}", row["verdict"]])
    return table(head, body)


def shown(estimate: dict[str, float] | None, sign: str = "") -> str:
    """Value and interval with two decimals; empty without an estimate."""
    if estimate is None:
        return ""
    return f"{estimate['value']:{sign}.2f} ({estimate['low']:{sign}.2f} to {estimate['high']:{sign}.2f})"


def draw_frontier(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Plot gold gain, with the KL next to it, at each decoding temperature: a panel per quality, a line per method."""
    plt = pyplot("protocol")
    qualities = list(dict.fromkeys(row["quality"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    size = (3.4 * len(qualities) + 1.2, 0.55 * len(methods) + 1.9)
    figure, axes = plt.subplots(1, len(qualities), figsize=size, squeeze=False, sharex=True, sharey=True)
    for panel, quality in zip(axes[0], qualities, strict=True):
        here = {row["method"]: row["frontier"] for row in rows if row["quality"] == quality}
        here["reference"] = next(row["reference_frontier"] for row in rows if row["quality"] == quality)
        heats = sorted((point["temperature"] for point in here["reference"]), reverse=True)
        panel.axvline(0, color="0.6", linewidth=1)
        for k, heat in enumerate(heats):
            for name, points in here.items():
                point = next(point for point in points if point["temperature"] == heat)
                gain, place = point["gain"], [*methods, "reference"].index(name)
                y = place + 0.5 * (k - (len(heats) - 1) / 2) / len(heats)
                low, middle, high = ends(gain)
                error = [[middle - low], [high - middle]]
                label = f"temperature {heat:g}" if name == "reference" else None
                panel.errorbar(
                    gain["value"], y, xerr=error, color=f"C{k}", fmt="o", markersize=4, capsize=2, label=label
                )
                panel.annotate(
                    f"KL {point['kl']:.2f}", (1.02, y), xycoords=("axes fraction", "data"), fontsize=6, va="center"
                )
        panel.set_title(f"{quality} quality", fontsize=9)
        panel.set_xlabel("gold reward minus the reference's at 1", fontsize=8)
    axes[0, 0].set_yticks(range(len(methods) + 1), [*methods, "reference"])
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, target)
