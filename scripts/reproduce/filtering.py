"""Is a filtered part of noisy pairs worth all of them to a policy? Gold reward against the share kept, in the arena.

A pool has 1,600 pairs of the arena (scripts/reproduce/arena.py): sound; or four fifths near-copies of 40 prompts; or a
fifth junk with labels drawn by a fair coin (scripts/reproduce/exact_arena/pool.py). 0, 20 or 40% of the labels are
flipped. Margins are cross-fitted on these labels, or come from an outside reward model with independent or shared
errors. Subsets of 5, 10, 20 and 40% are chosen by importance, by greedy selection, by each component alone, and at
random. DPO trains on each; on the random one soft labels from the same margins train as well, the control that uses
the margins without dropping pairs by them.

Fixed beforehand: four betas for every subset and number of steps, chosen by gold reward at KL 0.5 on 20 validation
seeds; the outcome is that on 100 other seeds. Every policy takes 100 steps of 32 pairs, whatever the size of its
subset, so all shares cost the same to train; 12, 25 and 50 steps show how soon each is as good as DPO on all pairs
after 100. All pairs and a fifth of them are also trained for 200 and 400 steps: a lead after 100 may be mere speed.

A cell is one JSON file under --output and is not computed again. The same command prints the tables of docs/results.md
and writes arena_filtering.json and the plot:

    python -m scripts.reproduce.filtering
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.io.hashing import digest
from align.io.stage import versions
from align.losses.registry import resolve
from scripts.reproduce.arena import VALIDATION, prompts_of
from scripts.reproduce.exact_arena.gold import gold_reward
from scripts.reproduce.exact_arena.methods import BETAS
from scripts.reproduce.exact_arena.pool import (
    ALL,
    ALL_SOFT,
    ARMS,
    KEEPS,
    KINDS,
    RANDOM,
    SOFT,
    WEIGHTS,
    PoolCell,
    draw_pool,
)
from scripts.reproduce.exact_arena.pool_report import LONG, draw_plot, markdown, named, summarize
from scripts.reproduce.exact_arena.training import Recipe, train
from scripts.reproduce.exact_arena.world import World
from scripts.tables import update_page

MARK = "scripts/reproduce/filtering.py"
"""Mark of the tables in a page."""
FLIPS = (0.0, 0.2, 0.4)
ERRORS = ("cross-fitted", "independent", "shared")
STEPS = (12, 25, 50, 100)
FOUR = BETAS[1::3]
LONG_STEPS = (200, 400)
"""Steps of the longer trainings, those of ``LONG``."""
KL = 0.5
BLOCK = 50
"""Seeds trained together."""
RECIPES = {loss: [Recipe(resolve(loss, {"beta": beta})) for beta in FOUR] for loss in ("dpo", "mmpo")}


def cells(pairs: int) -> list[PoolCell]:
    """Every cell; those with cross-fitted margins come first."""
    return [PoolCell(pairs, flips, kind, error) for error in ERRORS for kind in KINDS for flips in FLIPS]


def trainings() -> dict[str, tuple[str, float, str]]:
    """Name -> arm that chooses the rows, share kept, loss."""
    found = {ALL: (RANDOM, 1.0, "dpo"), ALL_SOFT: (RANDOM, 1.0, "mmpo")}
    for keep in KEEPS:
        for arm in ARMS:
            found[named(arm, keep)] = (RANDOM, keep, "mmpo") if arm == SOFT else (arm, keep, "dpo")
    return found


def rewards(worlds: list[World], recipes: list[Recipe], steps: int, blocks: list[range]) -> np.ndarray:
    """Gold reward [S, M] of every recipe on each seed's new prompts, at the KL of the outcome."""
    found = []
    for world, block in zip(worlds, blocks, strict=True):
        theta = train(world, recipes, seed=block.start, steps=steps)
        for one, gold, seed in zip(theta, world.gold, block, strict=True):
            found.append(gold_reward(one, gold, prompts_of(seed), (KL,))[0])
    return np.array(found)


def run_cell(cell: PoolCell, seeds: int, names: Sequence[str], steps: Sequence[int]) -> dict[str, Any]:
    """Choose each beta on validation seeds, judge it on test seeds: training -> steps -> beta, gold rewards [S]."""
    start = time.monotonic()
    blocks = [range(first, min(first + BLOCK, seeds)) for first in range(0, seeds, BLOCK)]
    validation, test = draw_pool(cell, VALIDATION), [draw_pool(cell, block) for block in blocks]
    found: dict[str, Any] = {}
    for name in names:
        arm, keep, loss = trainings()[name]
        count, recipes = round(keep * cell.pairs), RECIPES[loss]
        tried, held = validation.subset(arm, count), [pool.subset(arm, count) for pool in test]
        found[name] = {"gold_labels": float(np.mean([(world.gold_margin > 0).mean() for world in held]))}
        for taken in steps:
            best = int(rewards([tried], recipes, taken, [VALIDATION]).mean(axis=0).argmax())
            reward = rewards(held, [recipes[best]], taken, blocks)[:, 0]
            found[name][f"{taken}"] = {"beta": FOUR[best], "reward": reward.round(5).tolist()}
    seconds = time.monotonic() - start
    return {
        "key": key(seeds, names, steps), "cell": asdict(cell), "found": found, "versions": versions(),
        "seconds": seconds,
    }  # fmt: skip


def key(seeds: int, names: Sequence[str], steps: Sequence[int]) -> str:
    """Digest of everything but the code that a cell's numbers come from."""
    trained = {name: trainings()[name] for name in names}
    return digest([trained, FOUR, steps, KL, list(VALIDATION), BLOCK, WEIGHTS, seeds])


def kept_cell(cell: PoolCell, seeds: int, folder: Path) -> dict[str, Any]:
    """A cell with its longer trainings, read from its files or computed."""
    parts: dict[str, tuple[list[str], Sequence[int]]] = {
        "": (list(trainings()), STEPS),
        "-long": (list(LONG), LONG_STEPS),
    }
    found = []
    for ending, (names, steps) in parts.items():
        file = folder / f"{cell.name.replace(', ', '-').replace(' ', '_')}{ending}.json"
        if not file.exists() or read_json(file)["key"] != key(seeds, names, steps):
            write_json(file, run_cell(cell, seeds, names, steps))
            log.info("%s%s", cell.name, ending)
        found.append(read_json(file))
    for longer in found[1:]:
        for name, one in longer["found"].items():
            found[0]["found"][name] |= one
        found[0]["seconds"] += longer["seconds"]
    return dict(found[0])


def main() -> None:
    """Compute the missing cells; write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce-filtering"))
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=1600)
    parser.add_argument("--document", type=Path, help="page whose tables to replace, e.g. docs/results.md")
    arguments = parser.parse_args()
    configure()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = [kept_cell(cell, arguments.seeds, arguments.output) for cell in cells(arguments.pairs)]
    rows = summarize(found, STEPS, LONG_STEPS)
    summary = {"seeds": arguments.seeds, "seconds": round(sum(cell["seconds"] for cell in found)), "rows": rows}
    small = arguments.output / "arena_filtering.json"
    small.write_text(json.dumps(summary, separators=(",", ":")) + "\n", encoding="utf-8")
    draw_plot(rows, STEPS, arguments.output / "filtering.svg")
    tables = markdown(rows, STEPS, LONG_STEPS)
    print(tables)
    if arguments.document:
        update_page(arguments.document, tables, MARK)


if __name__ == "__main__":
    main()
