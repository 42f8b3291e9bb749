"""Which rule chooses best between label and margin? The exact arena (scripts/reproduce/exact_arena), gold reward known.

A pair is two responses with 20 Gaussian features; the gold reward is linear in them and its margins have standard
deviation 2. The label is drawn by Bradley-Terry from the gold margin and then flipped in a given share of the pairs.
Policies are the exact linear ones of `align trust`; they are compared by the exact gold reward on new prompts with 6
responses at equal KL to the uniform reference.

A cell is (margins, flips, pairs); each block of its seeds is one JSON file that is not computed again.

    python -m scripts.study.trust --seeds 40
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from align.io.console import configure, progress
from align.io.files import read_json, write_json
from align.trust.evidence import fit_evidence
from align.trust.linear_proxy import DPO, GRID, MADPO, SOFT, Family, fit, held_out, scaled
from align.trust.selection import by_labels, choose
from scripts.reproduce.exact_arena.gold import gold_reward
from scripts.reproduce.exact_arena.heads import FOLDS
from scripts.reproduce.exact_arena.report import OUTCOMES
from scripts.reproduce.exact_arena.world import draw_pairs
from scripts.tables import table

FAMILY = Family()
MARGINS = (
    *(f"independent {s}" for s in (0.3, 1, 2, 4, 8)),
    *(f"shared {s}" for s in (1, 2, 4)),
    *(f"out-of-fold {k}" for k in (20, 10, 5)),
)
ALLOWED = {
    "DPO": np.array([s == DPO for s in GRID]),
    "MADPO": np.array([s == MADPO for s in GRID]),
    "soft labels": np.array([s == SOFT for s in GRID]),
    "DPO or soft by CV": np.array([s in (DPO, SOFT) for s in GRID]),
    "trust, g = 0": np.array([s.strength == 0 for s in GRID]),
    "trust": np.array([True for _ in GRID]),
}


def run_seed(kind: str, flips: float, count: int, seed: int) -> dict[str, Any]:
    """Gold reward of every rule, and what trust and evidence chose."""
    rng = np.random.default_rng([seed, MARGINS.index(kind), round(100 * flips), count])
    world = draw_pairs(count, flips, kind, rng)
    x, margin = scaled(world.difference[0]), world.margin[0]
    found = held_out(x, margin, [rng.permutation(count) % FOLDS], FAMILY)
    theta = fit(x, margin, found.slope, FAMILY)
    evidence = fit_evidence(x, margin)
    choices = {name: by_labels(found.loglik, allowed) for name, allowed in ALLOWED.items()}
    same_labels = kind.startswith("out-of-fold")
    choices["combined"] = choose(found, theta, evidence.theta, x, FAMILY, same_labels=same_labels)
    columns = np.stack([theta[:, c.setting, c.spread] for c in choices.values()] + [evidence.theta], axis=1)
    reward = gold_reward(columns, world.gold[0], rng, OUTCOMES)
    return {
        "reward": dict(zip([*choices, "evidence"], reward.T.tolist(), strict=True)),
        "chosen": {name: [GRID[c.setting].trust, GRID[c.setting].strength] for name, c in choices.items()},
        "slope": found.slope,
        "labels_prefer_dpo": float(np.diff([_best(found.loglik, name).mean() for name in ("soft labels", "DPO")])[0]),
        "evidence": {
            "slope": evidence.slope, "shared_error": evidence.shared_error,
            "independent_error": evidence.independent_error, "flip_rate": evidence.flip_rate,
        },
    }  # fmt: skip


def _best(loglik: np.ndarray, rule: str) -> np.ndarray:
    choice = by_labels(loglik, ALLOWED[rule])
    values: np.ndarray = loglik[:, choice.setting, choice.spread]
    return values


def cells(sizes: list[int]) -> list[tuple[str, float, int]]:
    """Every (margins, flips, pairs)."""
    return [(kind, flips, count) for count in sizes for flips in (0.0, 0.2, 0.4) for kind in MARGINS]


def block_file(folder: Path, cell: tuple[str, float, int], block: int) -> Path:
    """File of one block of seeds of a cell."""
    kind, flips, count = cell
    return folder / f"{count}-{round(100 * flips)}-{kind.replace(' ', '_')}-{block}.json"


def row(results: list[dict[str, Any]], kl: int) -> dict[str, Any]:
    """Mean rewards of a cell, and each rule's regret with the half-width of its 95% interval over the seeds."""
    reward = {name: np.array([r["reward"][name][kl] for r in results]) for name in results[0]["reward"]}
    better = max(("DPO", "soft labels"), key=lambda name: reward[name].mean())
    regret = {name: reward[better] - values for name, values in reward.items()}
    return {
        "seeds": len(results),
        "DPO": float(reward["DPO"].mean()),
        "soft labels": float(reward["soft labels"].mean()),
        "regret": {name: float(values.mean()) for name, values in regret.items()},
        "half_width": {
            name: float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) for name, values in regret.items()
        },
        "chosen": {
            name: np.mean([r["chosen"][name] for r in results], axis=0).round(3).tolist()
            for name in ("trust", "combined")
        },
        "labels_prefer_dpo": float(np.mean([r["labels_prefer_dpo"] > 0 for r in results])),
        "flip_rate": float(np.mean([r["evidence"]["flip_rate"] for r in results])),
        "shared_error": float(np.median([r["evidence"]["shared_error"] for r in results])),
        "independent_error": float(np.median([r["evidence"]["independent_error"] for r in results])),
        "slope": float(np.mean([r["evidence"]["slope"] for r in results])),
    }


def summarize(found: dict[tuple[str, float, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """A row per cell and KL; each rule's mean and worst regret over the cells."""
    made: dict[str, Any] = {"rows": {}, "mean_regret": {}, "worst_regret": {}, "by_flips": {}}
    for k, kl in enumerate(OUTCOMES):
        rows = {f"{kind}, {flips:.0%} flipped, {count} pairs": row(results, k) for (kind, flips, count), results in
                found.items() if len(results) > 1}  # fmt: skip
        if not rows:
            continue
        made["rows"][kl] = rows
        made["by_flips"][kl] = by_flips(rows)
        for name, reduce in (("mean_regret", np.mean), ("worst_regret", np.max)):
            made[name][kl] = {
                rule: float(reduce([one["regret"][rule] for one in rows.values()]))
                for rule in next(iter(rows.values()))["regret"]
            }
    return made


def by_flips(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Number of pairs and share of flips -> rule -> mean and worst regret over the kinds of margins."""
    groups: dict[str, list[dict[str, float]]] = {}
    for name, one in rows.items():
        _, flips, pairs = name.split(", ")
        groups.setdefault(f"{pairs}, {flips}", []).append(one["regret"])
    for name, one in rows.items():
        groups.setdefault(f"{name.split(', ')[2]}, all", []).append(one["regret"])
    return {
        group: {
            rule: [float(np.mean([r[rule] for r in regrets])), max(r[rule] for r in regrets)] for rule in regrets[0]
        }
        for group, regrets in groups.items()
    }


def markdown_by_flips(summary: dict[str, Any], kl: float) -> str:
    """The page's first table: mean (worst) difference to the better of DPO and soft labels."""
    groups = summary["by_flips"][kl]
    rules = list(next(iter(groups.values())))
    body = [
        [group, *(f"{-found[rule][0]:+.3f} ({-found[rule][1]:+.3f})" for rule in rules)]
        for group, found in groups.items()
    ]
    return table(["cells", *rules], body)


def markdown(summary: dict[str, Any], kl: float) -> str:
    """The page's second table: gold reward of DPO and soft labels, other rules' difference to the better of the two."""
    rows = summary["rows"][kl]
    rules = [name for name in next(iter(rows.values()))["regret"] if name not in ("DPO", "soft labels")]
    body = []
    for name, one in rows.items():
        half = {rule: f" ± {one['half_width'][rule]:.3f}" if rule == "combined" else "" for rule in rules}
        differences = [f"{-one['regret'][rule]:+.3f}{half[rule]}" for rule in rules]
        body.append([name, f"{one['DPO']:.3f}", f"{one['soft labels']:.3f}", *differences])
    for key, title in (("mean_regret", "mean"), ("worst_regret", "worst")):
        at = summary[key][kl]
        body.append([f"{title} difference", *(f"{-at[rule]:+.3f}" for rule in ("DPO", "soft labels", *rules))])
    return table(["cell", "DPO", "soft labels", *rules], body)


def main() -> None:
    """Compute the missing blocks, print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study-trust"))
    parser.add_argument("--pairs", nargs="*", type=int, default=[100, 400, 1600])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first-block", type=int, default=0, help="ignore earlier blocks, in the table too")
    parser.add_argument("--block", type=int, default=10, help="seeds per file")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further block after this time")
    parser.add_argument("--kl", type=float, default=0.5, help="KL of the Markdown tables on stderr")
    arguments = parser.parse_args()
    configure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    wanted = [
        (cell, block)
        for block in range(arguments.first_block, -(-arguments.seeds // arguments.block))
        for cell in cells(arguments.pairs)
    ]
    missing = [(cell, block) for cell, block in wanted if not block_file(arguments.output, cell, block).exists()]
    end = time.monotonic() + 60 * arguments.minutes
    for cell, block in progress(missing, what="arena", total=len(missing), unit="blocks"):
        if time.monotonic() > end:
            break
        seeds = range(block * arguments.block, (block + 1) * arguments.block)
        write_json(block_file(arguments.output, cell, block), [run_seed(*cell, seed) for seed in seeds])
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for cell, block in wanted:
        file = block_file(arguments.output, cell, block)
        found.setdefault(cell, []).extend(read_json(file) if file.exists() else [])
    summary = summarize(found)
    if summary["rows"]:
        print(markdown_by_flips(summary, arguments.kl), markdown(summary, arguments.kl), sep="\n\n", file=sys.stderr)
    write_json(arguments.output / "table.json", summary)
    json.dump(summary, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
