"""The tables and plots of docs/results.md that scripts/reproduce/arena.py writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bootstrap import bootstrap_mean
from scripts.figures import pyplot, save
from scripts.tables import table

OUTCOMES = (0.25, 0.5, 1.0)
MAIN_KL = 0.5
BASELINE = "dpo"
MADPO = "madpo, tuned"
CONTROLS = ("soft_madpo", "mmpo", "rpo_sq", "dpo, relabelled", "dpo, redrawn", "trust", "ipo", "beta_dpo", "odpo")
"""Methods that MADPO is compared with, next to DPO."""
MAIN = ("madpo, published", MADPO, "soft_madpo", "mmpo", "dpo, relabelled", "trust")
OTHERS = ("ipo", "beta_dpo", "odpo", "rpo_sq", "dpo, redrawn", "madpo, amplify only", "madpo, dampen only")
PLOTTED = (MADPO, "soft_madpo", "mmpo", "dpo, relabelled", "trust", "beta_dpo")
UNTUNED = "untuned "
SEEN_EVERYWHERE = 0.2
"""Largest share of flips that every size and spread has."""
Interval = tuple[float, float, float]
"""Mean and the ends of its 95% bootstrap interval over the seeds."""


def summarize(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per cell, DPO's mean gold reward and the paired differences of all others to it, with intervals."""
    rows = [_row(cell) for cell in found]
    seconds = sum(cell["seconds"] for cell in found)
    return {"seeds": sorted({cell["seeds"] for cell in found}), "seconds": round(seconds), "rows": rows}


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    tuned = {name: one for name, one in cell["found"].items() if not name.startswith(UNTUNED)}
    untuned = {name.removeprefix(UNTUNED): one for name, one in cell["found"].items() if name.startswith(UNTUNED)}
    rewards = {name: np.array(one["equal"]) for name, one in tuned.items()}
    made: dict[str, Any] = {"cell": cell["cell"], "chosen": cell["chosen"], "difference": {}, "over": {}}
    for k, kl in enumerate(cell["kls"]):
        base = rewards[BASELINE][:, k]
        differences = {name: interval(values[:, k] - base) for name, values in rewards.items() if name != BASELINE}
        made["difference"][f"{kl:g}"] = {BASELINE: round(float(base.mean()), 4), **differences}
        if kl == MAIN_KL:
            made["over"] = {name: interval(rewards[MADPO][:, k] - rewards[name][:, k]) for name in CONTROLS}
            made["untuned"] = {name: _untuned(one, k) for name, one in untuned.items()}
    return made


def _untuned(one: dict[str, Any], kl: int) -> dict[str, float]:
    return {
        "reward": round(float(np.mean(one["reward"])), 3),
        "kl": round(float(np.mean(one["kl"])), 3),
        "equal": round(float(np.mean(np.array(one["equal"])[:, kl])), 3),
    }


def interval(values: np.ndarray) -> Interval:
    """Mean of values [S] with its bootstrap interval over the seeds."""
    estimate = bootstrap_mean(values, seed=0)
    return round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4)


def compact(summary: dict[str, Any]) -> dict[str, Any]:
    """The part of the summary that the tables need: outcomes only, intervals at the main KL only."""
    rows = []
    for row in summary["rows"]:
        kept = {f"{kl:g}": row["difference"][f"{kl:g}"] for kl in OUTCOMES}
        for kl, found in kept.items():
            if kl != f"{MAIN_KL:g}":
                kept[kl] = {name: value if name == BASELINE else value[:1] for name, value in found.items()}
        rows.append({"cell": row["cell"], "difference": kept, "over": row["over"], "untuned": row["untuned"]})
    return {**summary, "rows": rows}


def markdown(summary: dict[str, Any]) -> str:
    """Every table of the arena in docs/results.md, under its title."""
    rows, main = summary["rows"], _main(summary["rows"])
    tables = [
        ("All cells at KL 0.5, differences to DPO", overview(rows)),
        ("MADPO (tuned) minus another method, KL 0.5", against_controls(rows)),
    ]
    if main:
        tables += [
            ("400 pairs, any pair of a prompt, KL 0.5", differences(main, MAIN)),
            ("The other methods in the same cells", differences(main, OTHERS)),
            ("One beta for all, judged where training ends", untuned(main)),
        ]
    tables += [(f"Which pairs and how many, KL 0.5: {name}", by_factor(rows, name)) for name in ("spread", "pairs")]
    tables += [("Mean over all cells at each KL", by_kl(rows))]
    return "\n\n".join(f"#### {title}\n\n{table}" for title, table in tables)


def _main(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["cell"]["pairs"] == 400 and row["cell"]["spread"] == "even"]


def differences(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """A row per cell: DPO's gold reward and every method's difference to it with its interval."""
    made = []
    for row in rows:
        found = row["difference"][f"{MAIN_KL:g}"]
        label = f"{row['cell']['error']}, {row['cell']['flips']:.0%} flipped"
        made.append([label, f"{found[BASELINE]:.3f}", *(shown(found[name]) for name in methods)])
    return table(["reward model's error", "DPO", *methods], made)


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """A row per method: mean difference to DPO by flips, extreme cells, cells better and worse beyond the interval."""
    made = []
    for name in [name for name in rows[0]["difference"][f"{MAIN_KL:g}"] if name != BASELINE]:
        found = [(row["cell"], row["difference"][f"{MAIN_KL:g}"][name]) for row in rows]
        by_flips = [
            f"{np.mean([d[0] for cell, d in found if cell['flips'] == flips]):+.3f}" for flips in _levels(rows, "flips")
        ]
        worst, best = min(d[0] for _, d in found), max(d[0] for _, d in found)
        better, worse = sum(d[1] > 0 for _, d in found), sum(d[2] < 0 for _, d in found)
        made.append([name, *by_flips, f"{worst:+.3f}", f"{best:+.3f}", str(better), str(worse)])
    flips = [f"mean, {flips:.0%} flipped" for flips in _levels(rows, "flips")]
    return table(["method", *flips, "worst cell", "best cell", "cells better", "cells worse"], made)


def against_controls(rows: Sequence[dict[str, Any]]) -> str:
    """A row per control: mean of MADPO's lead, cells in which it leads or trails beyond its interval."""
    made = []
    for name in CONTROLS:
        leads = [row["over"][name] for row in rows]
        ahead, behind = sum(lead[1] > 0 for lead in leads), sum(lead[2] < 0 for lead in leads)
        mean = np.mean([lead[0] for lead in leads])
        worst, best = min(lead[0] for lead in leads), max(lead[0] for lead in leads)
        made.append([name, f"{mean:+.3f}", f"{worst:+.3f}", f"{best:+.3f}", str(ahead), str(behind), str(len(leads))])
    return table(["MADPO against", "mean", "worst cell", "best cell", "cells ahead", "cells behind", "cells"], made)


def by_factor(rows: Sequence[dict[str, Any]], factor: str) -> str:
    """A row per level of a factor: mean difference to DPO over the cells that differ only in that factor."""
    fixed = {"spread": ("pairs", 400), "pairs": ("spread", "even")}[factor]
    rows = [row for row in rows if row["cell"][fixed[0]] == fixed[1] and row["cell"]["flips"] <= SEEN_EVERYWHERE]
    made = []
    for level in _levels(rows, factor):
        found = [row["difference"][f"{MAIN_KL:g}"] for row in rows if row["cell"][factor] == level]
        means = [f"{np.mean([one[name][0] for one in found]):+.3f}" for name in (*MAIN, *OTHERS)]
        made.append([str(level), f"{np.mean([one[BASELINE] for one in found]):.3f}", *means])
    return table([factor, "DPO", *MAIN, *OTHERS], made)


def by_kl(rows: Sequence[dict[str, Any]]) -> str:
    """A row per KL: DPO's mean gold reward and every method's mean difference to it."""
    made = []
    for kl in (f"{kl:g}" for kl in OUTCOMES):
        found = [row["difference"][kl] for row in rows]
        means = [f"{np.mean([one[name][0] for one in found]):+.3f}" for name in (*MAIN, *OTHERS)]
        made.append([kl, f"{np.mean([one[BASELINE] for one in found]):.3f}", *means])
    return table(["KL", "DPO", *MAIN, *OTHERS], made)


def untuned(rows: Sequence[dict[str, Any]]) -> str:
    """A row per cell: each untuned method's reward (KL) as trained and, in brackets, its reward at KL 0.5."""
    made = []
    for row in rows:
        label = f"{row['cell']['error']}, {row['cell']['flips']:.0%} flipped"
        found = row["untuned"].values()
        made.append([label, *(f"{one['reward']:.2f} ({one['kl']:.2f}) [{one['equal']:.3f}]" for one in found)])
    return table(["reward model's error", *rows[0]["untuned"]], made)


def _levels(rows: Sequence[dict[str, Any]], factor: str) -> list[Any]:
    return sorted({row["cell"][factor] for row in rows})


def shown(interval: Sequence[float]) -> str:
    """Value and interval, in bold if the complete interval lies above 0."""
    value, low, high = interval
    text = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 else text


def draw_plots(summary: dict[str, Any], folder: Path) -> None:
    """``flips.svg``: difference to DPO against flipped labels; ``frontier.svg``: against KL. A panel per error."""
    rows = _main(summary["rows"])
    if not rows:
        return
    at = f"{MAIN_KL:g}"
    flips = {
        (row["cell"]["error"], name): [
            (other["cell"]["flips"], other["difference"][at][name]) for other in rows if _same_error(row, other)
        ]
        for row in rows
        for name in PLOTTED
    }
    noisy = [row for row in rows if row["cell"]["flips"] == 0.2]
    frontier = {
        (row["cell"]["error"], name): [(float(kl), found[name]) for kl, found in row["difference"].items()]
        for row in noisy
        for name in PLOTTED
    }
    _plot(flips, folder / "flips.svg", x_title="share of labels flipped")
    if frontier:
        _plot(frontier, folder / "frontier.svg", x_title="KL to the reference (20% flipped)")


def _same_error(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["cell"]["error"] == other["cell"]["error"])


def _plot(curves: dict[tuple[str, str], list[tuple[float, Interval]]], target: Path, *, x_title: str) -> None:
    plt = pyplot("arena")
    errors = list(dict.fromkeys(error for error, _ in curves))
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.0), squeeze=False, sharex=True)
    for panel, error in zip(axes.flat, errors, strict=False):
        panel.axhline(0, color="0.6", linewidth=1)
        for name in PLOTTED:
            points = curves[error, name]
            x, value, low, high = (np.array(v) for v in zip(*((x, *d) for x, d in points), strict=True))
            panel.errorbar(x, value, yerr=(value - low, high - value), label=name, marker="o", markersize=3, capsize=2)
        panel.set_title(f"reward model's error: {error}", fontsize=9)
    for panel in axes[:, 0]:
        panel.set_ylabel("gold reward minus DPO's")
    for panel in axes[-1]:
        panel.set_xlabel(x_title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(PLOTTED), fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, target)
