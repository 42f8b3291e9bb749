"""The tables and the plot of docs/results.md that scripts/reproduce/filtering.py writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.figures import pyplot, save
from scripts.reproduce.exact_arena.pool import ALL, ALL_SOFT, ARMS, GREEDY, KEEPS, KINDS, RANDOM, SOFT
from scripts.reproduce.exact_arena.report import interval, shown
from scripts.tables import table

MAIN_KEEP, MAIN_ERROR = 0.2, "cross-fitted"
CURVES = ("filtered", "margin", GREEDY)
"""Arms that the tables show at every share kept."""
SHADES = {
    RANDOM: "#6e7781", SOFT: "#0072b2", "filtered": "#d55e00", GREEDY: "#e69f00",
    "margin": "#009e73", "quality": "#cc79a7", "diversity": "#56b4e9",
}  # fmt: skip


def named(arm: str, keep: float) -> str:
    """Name of a training on a subset."""
    return f"{arm}, {keep:g}"


LONG = (ALL, ALL_SOFT, *(named(arm, MAIN_KEEP) for arm in (RANDOM, SOFT, "filtered")))
"""Trainings that are also run for longer."""


def summarize(
    found: Sequence[dict[str, Any]], steps: Sequence[int], longer: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Mean reward and its paired differences, with intervals, of each cell, training and number of steps.

    ``less_all`` is the difference to DPO on all pairs after ``max(steps)`` steps, or under ``longer`` after as many;
    ``less_random`` is the difference to DPO on a random subset of the same size after as many steps.
    """
    rows = []
    for cell in found:
        trained, last = cell["found"], f"{max(steps)}"
        whole = np.array(trained[ALL][last]["reward"])
        made: dict[str, Any] = {}
        for name, one in trained.items():
            keep = name.rpartition(", ")[2]
            random = trained[ALL if name in (ALL, ALL_SOFT) else f"{RANDOM}, {keep}"]
            made[name] = {"gold_labels": round(one["gold_labels"], 4)}
            for count in map(str, steps):
                reward = np.array(one[count]["reward"])
                made[name][count] = {
                    "reward": round(float(reward.mean()), 4),
                    "less_all": interval(reward - whole),
                    "less_random": interval(reward - np.array(random[count]["reward"])),
                }
        row = {"cell": cell["cell"], "trainings": made}
        if longer:
            row["longer"] = _longer(trained, longer)
        rows.append(row)
    return rows


def _longer(trained: dict[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """Steps -> training -> mean reward, and difference to DPO on all pairs after as many steps."""
    made: dict[str, Any] = {}
    for count in map(str, steps):
        rewards = {name: np.array(trained[name][count]["reward"]) for name in LONG}
        made[count] = {
            name: {"reward": round(float(reward.mean()), 4), "less_all": interval(reward - rewards[ALL])}
            for name, reward in rewards.items()
        }
    return made


def soonest(trained: dict[str, Any], steps: Sequence[int]) -> str:
    """The fewest steps after which the mean is not below that of DPO on all pairs after ``max(steps)``."""
    return next((str(count) for count in steps if trained[f"{count}"]["less_all"][0] >= 0), "-")


def markdown(rows: Sequence[dict[str, Any]], steps: Sequence[int], longer: Sequence[int] = ()) -> str:
    """Tables of a fifth of the pairs under each kind of margins and after longer trainings; under cross-fitted margins
    also of every share kept, and of the steps until DPO on all pairs is reached.
    """
    last, parts = f"{max(steps)}", []
    for error in dict.fromkeys(row["cell"]["error"] for row in rows):
        body = []
        for row in rows:
            if row["cell"]["error"] == error:
                found = row["trainings"]
                rewards = [f"{found[name][last]['reward']:.3f}" for name in (ALL, named(RANDOM, MAIN_KEEP))]
                less = [shown(found[named(arm, MAIN_KEEP)][last]["less_random"]) for arm in ARMS[1:]]
                body.append([_condition(row), *rewards, *less])
        title = f"Gold reward of all pairs, of a random {MAIN_KEEP:.0%}, and others minus it; {error} margins"
        parts.append((title, table(["pool", ALL, RANDOM, *ARMS[1:]], body)))
    here = [row for row in rows if row["cell"]["error"] == MAIN_ERROR]
    names = [named(arm, keep) for arm in CURVES for keep in KEEPS] + [ALL_SOFT]
    body = [[_condition(row), *(shown(row["trainings"][name][last]["less_all"]) for name in names)] for row in here]
    parts.append((f"Minus DPO on all pairs, {MAIN_ERROR} margins, by share kept", table(["pool", *names], body)))
    names = [*(named(arm, MAIN_KEEP) for arm in ARMS), ALL, ALL_SOFT]
    body = [[_condition(row), *(soonest(row["trainings"][name], steps) for name in names)] for row in here]
    title = (
        f"Steps (of {', '.join(map(str, steps))}) until DPO on all pairs after {last} is reached, {MAIN_ERROR} margins"
    )
    parts.append((title, table(["pool", *names], body)))
    for error in dict.fromkeys(row["cell"]["error"] for row in rows) if longer else ():
        body = []
        for row in rows:
            if row["cell"]["error"] == error:
                after = {last: {name: row["trainings"][name][last] for name in LONG}, **row["longer"]}
                for count, found in after.items():
                    less = [shown(found[name]["less_all"]) for name in LONG[1:]]
                    body.append([_condition(row), count, f"{found[ALL]['reward']:.3f}", *less])
        title = f"After more steps: all pairs, and others minus it after as many; {error} margins"
        parts.append((title, table(["pool", "steps", *LONG], body)))
    return "\n\n".join(f"#### {title}\n\n{text}" for title, text in parts)


def _condition(row: dict[str, Any]) -> str:
    return f"{row['cell']['kind']}, {row['cell']['flips']:.0%} flipped"


def draw_plot(rows: Sequence[dict[str, Any]], steps: Sequence[int], target: Path) -> None:
    """Plot gold reward against the share kept: a line per arm, a panel per kind of pool and share of flips."""
    plt = pyplot("filtering")
    here, last = [row for row in rows if row["cell"]["error"] == MAIN_ERROR], f"{max(steps)}"
    flips = sorted({row["cell"]["flips"] for row in here})
    figure, axes = plt.subplots(len(KINDS), len(flips), figsize=(10.5, 8.5), squeeze=False, sharex=True)
    for row in here:
        axis = axes[KINDS.index(row["cell"]["kind"])][flips.index(row["cell"]["flips"])]
        for arm, shade in SHADES.items():
            reward = [row["trainings"][named(arm, keep)][last]["reward"] for keep in KEEPS]
            axis.plot([100 * keep for keep in KEEPS], reward, color=shade, label=arm, marker="o", ms=3)
        axis.axhline(row["trainings"][ALL][last]["reward"], color="black", ls="--", lw=1, label=ALL)
        axis.set_title(_condition(row), fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks([100 * keep for keep in KEEPS], [f"{100 * keep:g}" for keep in KEEPS])
        axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("pairs kept, %")
    for axis in axes[:, 0]:
        axis.set_ylabel("gold reward at KL 0.5")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, target)
