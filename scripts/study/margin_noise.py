"""What do errors in the margins do to MADPO, and does calibrating, cross-fitting or averaging them help?

The world is that of scripts/study/trust.py: a gold reward linear in 20 features, policies compared by their exact gold
reward at KL 0.5 to the reference, here with 20% of the labels flipped. Margins are either the gold ones with noise of
growing size, times a scale that a reward model might have, or those of logistic reward models:

    in-sample     trained on the same pairs                      out-of-fold   each pair by a model without its fold
    ensemble      mean of 5 models on resamples, out of fold     moderated     the same, each margin by its spread
    outside       trained on four times as many other pairs

Each set of margins is used as it is (raw: MADPO reads a margin as log-odds) and calibrated (times the slope that makes
it log-odds of these labels). A cell (margins, block of seeds) is one JSON file that is not computed again.

    python -m scripts.study.margin_noise --seeds 60
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.io.console import configure, progress
from align.io.files import read_json, write_json
from align.losses.pair_weights import moderate
from align.trust.linear_proxy import DPO, MADPO, SOFT, Family, fit, log_sigmoid, scaled
from align.trust.slope import calibrated_slope
from scripts.reproduce.exact_arena.gold import gold_reward
from scripts.reproduce.exact_arena.heads import FOLDS, fit_head, out_of_fold_margins
from scripts.reproduce.exact_arena.report import MAIN_KL
from scripts.reproduce.exact_arena.world import World, draw_labeled, draw_pairs
from scripts.tables import table

FAMILY = Family(grid=(DPO, MADPO, SOFT))
FLIPS, PAIRS, MEMBERS, BLOCK = 0.2, 400, 5, 10
SCALES, NOISES = (0.25, 1.0, 4.0), (0.0, 1.0, 2.0, 4.0, 8.0)
MODELS = ("in-sample", "out-of-fold", "ensemble", "moderated", "outside")
KINDS = (*(f"noise {noise:g}, scale {scale:g}" for noise in NOISES for scale in SCALES), *MODELS)


def draw_margins(kind: str, world: World, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Margins [N] of the kind called ``kind`` for the pairs of a world of one seed; ``others``: other pairs [M, D]."""
    x = world.difference[0]
    if kind.startswith("noise"):
        noise, scale = (float(part.split()[1]) for part in kind.split(", "))
        return scale * (world.gold_margin[0] + noise * rng.normal(size=len(x)))
    if kind == "in-sample":
        return scaled(x) @ fit_head(scaled(x), rng)
    if kind == "out-of-fold":
        return out_of_fold_margins(scaled(x), rng)
    if kind == "outside":
        return x @ fit_head(others, rng)
    members = np.stack([_resampled_out_of_fold(x, rng) for _ in range(MEMBERS)])
    mean, spread = torch.from_numpy(members.mean(axis=0)), torch.from_numpy(members.std(axis=0, ddof=1))
    return (moderate(mean, spread) if kind == "moderated" else mean).numpy()


def _resampled_out_of_fold(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Margins [N], each fold from a model fitted on a resample of the other folds."""
    fold, made = rng.permutation(len(x)) % FOLDS, np.empty(len(x))
    for number in range(FOLDS):
        others = np.flatnonzero(fold != number)
        made[fold == number] = x[fold == number] @ fit_head(x[rng.choice(others, len(others))], rng)
    return made


def trained(x: np.ndarray, margin: np.ndarray, slope: float, fold: np.ndarray) -> np.ndarray:
    """theta [D, 3] of DPO, MADPO and soft labels on slope * margin, each at the spread that held-out labels prefer."""
    loglik = np.zeros((len(margin), len(FAMILY.grid), len(FAMILY.spreads)))
    for number in range(FOLDS):
        test = fold == number
        theta = fit(x[~test], margin[~test], slope, FAMILY)
        loglik[test] = log_sigmoid(np.tensordot(x[test], theta, axes=1))
    spread = loglik.mean(axis=0).argmax(axis=1)
    every: np.ndarray = fit(x, margin, slope, FAMILY)[:, np.arange(len(FAMILY.grid)), spread]
    return every


def run_seed(kind: str, seed: int) -> dict[str, float]:
    """Gold reward of every rule, and how well the margins agree with labels and gold."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    world = draw_pairs(PAIRS, FLIPS, "none", np.random.default_rng(seed))
    others = draw_labeled(world.gold[0], 4 * PAIRS, FLIPS, np.random.default_rng([seed, 1]))
    margin = draw_margins(kind, world, others[:, 0] - others[:, 1], rng)
    x, fold = scaled(world.difference[0]), rng.permutation(PAIRS) % FOLDS
    slope = calibrated_slope(margin) if (margin < 0).any() else 1.0
    columns = np.concatenate([trained(x, margin, b, fold) for b in (1.0, slope)], axis=1)
    reward = gold_reward(columns, world.gold[0], np.random.default_rng([seed, 2]), (MAIN_KL,))[0]
    rules = {"DPO": 0, "MADPO raw": 1, "soft labels raw": 2, "MADPO calibrated": 4, "soft labels calibrated": 5}
    return {name: float(reward[k]) for name, k in rules.items()} | {
        "slope": slope,
        "agreement": float(np.mean(margin > 0)),
        "correlation": float(np.corrcoef(margin, world.gold_margin[0])[0, 1]),
    }


def summarize(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Kind of margins -> means, and each rule's difference to DPO with the half-width of its 95% interval."""
    made: dict[str, Any] = {}
    for kind, results in found.items():
        if len(results) < 2:
            continue
        columns = {name: np.array([result[name] for result in results]) for name in results[0]}
        gains = {rule: values - columns["DPO"] for rule, values in columns.items() if " " in rule}
        gains["MADPO calibrated less raw"] = columns["MADPO calibrated"] - columns["MADPO raw"]
        made[kind] = {"seeds": len(results), "DPO": float(columns["DPO"].mean())}
        made[kind] |= {name: float(columns[name].mean()) for name in ("slope", "agreement", "correlation")}
        made[kind]["gain"] = {
            rule: [float(v.mean()), float(1.96 * v.std(ddof=1) / np.sqrt(len(v)))] for rule, v in gains.items()
        }
    return made


def markdown(summary: dict[str, Any]) -> str:
    """The table of docs/reward-models.md."""
    rules = ("MADPO raw", "MADPO calibrated", "MADPO calibrated less raw", "soft labels raw", "soft labels calibrated")
    body = []
    for kind, row in summary.items():
        shown = [f"{row['gain'][rule][0]:+.3f} ± {row['gain'][rule][1]:.3f}" for rule in rules]
        body.append([kind, f"{row['correlation']:.2f}", f"{row['DPO']:.3f}", *shown])
    return table(["margins", "correlation with gold", "DPO", *rules], body)


def main() -> None:
    """Compute the missing blocks, write ``table.json``, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study-margin-noise"))
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further block after this time")
    arguments = parser.parse_args()
    configure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    wanted = [(kind, block) for block in range(-(-arguments.seeds // BLOCK)) for kind in KINDS]
    files = {cell: arguments.output / f"{KINDS.index(cell[0]):02d}-{cell[1]}.json" for cell in wanted}
    missing = [cell for cell in wanted if not files[cell].exists()]
    end = time.monotonic() + 60 * arguments.minutes
    for kind, block in progress(missing, what="arena", total=len(missing), unit="blocks"):
        if time.monotonic() > end:
            break
        seeds = range(block * BLOCK, (block + 1) * BLOCK)
        write_json(files[kind, block], [run_seed(kind, seed) for seed in seeds])
    found: dict[str, list[dict[str, float]]] = {}
    for (kind, _), file in files.items():
        found.setdefault(kind, []).extend(read_json(file) if file.exists() else [])
    summary = summarize(found)
    write_json(arguments.output / "table.json", summary)
    print(markdown(summary))
    json.dump({"blocks": sum(file.exists() for file in files.values()), "of": len(files)}, sys.stderr)


if __name__ == "__main__":
    main()
