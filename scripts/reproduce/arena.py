"""Does MADPO beat its controls? Every loss in an exact arena, 200 seeds per cell, paired differences to DPO.

A world: prompts with 6 responses of 20 Gaussian features, gold reward linear in them, one labeled pair per prompt. The
label is drawn by Bradley-Terry from the gold margin (standard deviation 2) and then flipped in a given share of the
pairs. The policy is softmax(x theta) over the responses, the reference is uniform. Policies are trained with the losses
of align/losses/pairwise.py, 100 steps of 32 pairs each.

Factors of a cell: number of pairs; share of flipped labels; which pair of a prompt is labeled (any, the closest of
three, the furthest apart of three); the reward model's error (none, independent, shared by all pairs, right in one
domain only, margins on its own training pairs that it remembers, cross-fitted margins).

Fixed beforehand: every method has 15 candidates, the same 12 betas and then 3 other values at the best of them; the one
with the highest mean gold reward at KL 0.5 on 20 validation seeds is trained on the 200 test seeds; the outcome is the
gold reward on new prompts at equal KL (0.25, 0.5, 1).

A cell is one JSON file under --output and is not computed again. The same command writes table.json, arena.json (only
what the tables need), the plots, and the tables of docs/results.md to standard output:

    python -m scripts.reproduce.arena
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.io.hashing import digest
from align.io.stage import versions
from scripts.reproduce.exact_arena.gold import SIZE, gold_reward, reward_and_kl
from scripts.reproduce.exact_arena.methods import METHODS, UNTUNED
from scripts.reproduce.exact_arena.report import compact, draw_plots, markdown, summarize
from scripts.reproduce.exact_arena.training import Recipe, train
from scripts.reproduce.exact_arena.world import ERRORS, Cell, World, draw_world
from scripts.tables import update_page

MARK = "scripts/reproduce/arena.py"
"""Mark of the tables in a page."""
VALIDATION = range(100_000, 100_020)
CHOICE_KL = 0.5
KLS = (0.1, 0.25, 0.5, 1.0, 1.4)
"""KLs of the frontier; 0.25, 0.5 and 1 are the outcome. No policy exceeds log 6 = 1.79."""
BLOCK = 50
"""Seeds trained together."""


def cells() -> list[Cell]:
    """Every cell: the main ones with up to 40% flips; other sizes, close and distant pairs with up to 20%."""
    conditions = [(400, "even", 0.4), (100, "even", 0.2), (400, "few easy", 0.2), (400, "many easy", 0.2)]
    return [
        Cell(pairs, flips, spread, error)
        for pairs, spread, most in [*conditions, (1600, "even", 0.2)]
        for flips in (0.0, 0.2, 0.4)
        for error in ERRORS
        if flips <= most
    ]


def rewards(world: World, theta: np.ndarray, seeds: range, kls: tuple[float, ...]) -> np.ndarray:
    """Gold reward [S, KLs, M] of theta [S, D, M] on each seed's new prompts."""
    found = zip(theta, world.gold, seeds, strict=True)
    return np.stack([gold_reward(one, gold, prompts_of(seed), kls) for one, gold, seed in found])


def prompts_of(seed: int) -> np.random.Generator:
    """Generator of the prompts on which a seed's policies are judged."""
    return np.random.default_rng([seed, 1])


def policies(cell: Cell, world: World, recipes: Sequence[Recipe], seeds: range, store: Path) -> np.ndarray:
    """theta [S, D, M] of every recipe; those that read no margins are trained once for all errors."""
    alone = [k for k, recipe in enumerate(recipes) if not recipe.needs_margin]
    others = [k for k, recipe in enumerate(recipes) if recipe.needs_margin]
    theta = np.empty((len(seeds), SIZE, len(recipes)))
    theta[..., others] = train(world, [recipes[k] for k in others], seed=seeds.start)
    named = [(recipes[k].loss.spec.name, dict(recipes[k].loss.parameters)) for k in alone]
    same = replace(cell, error=ERRORS[0])
    file = store / f"{digest([same.to_dict(), list(seeds), named])[:16]}.npy"
    if not file.exists():
        store.mkdir(parents=True, exist_ok=True)
        found = train(draw_world(same, seeds), [recipes[k] for k in alone], seed=seeds.start)
        temporary = file.with_suffix(".partial.npy")
        np.save(temporary, found)
        temporary.replace(file)
    theta[..., alone] = np.load(file, allow_pickle=False)
    return theta


def choose(cell: Cell, store: Path, seeds: range = VALIDATION) -> dict[str, tuple[Recipe, np.ndarray]]:
    """Method -> its best candidate on the validation seeds, and the mean reward there of each [CANDIDATES]."""
    world = draw_world(cell, seeds)

    def tried(recipes: Sequence[Sequence[Recipe]]) -> np.ndarray:
        """Mean reward [methods, candidates of each]."""
        theta = policies(cell, world, [recipe for each in recipes for recipe in each], seeds, store)
        return rewards(world, theta, seeds, (CHOICE_KL,))[:, 0].mean(axis=0).reshape(len(recipes), -1)

    first = [method.first() for method in METHODS.values()]
    of_betas = tried(first)
    then = [method.then(int(best)) for method, best in zip(METHODS.values(), of_betas.argmax(axis=1), strict=True)]
    values = np.concatenate([of_betas, tried(then)], axis=1)
    candidates = [[*one, *other] for one, other in zip(first, then, strict=True)]
    found = zip(METHODS, candidates, values, strict=True)
    return {name: (recipes[int(mean.argmax())], mean) for name, recipes, mean in found}


def judge(cell: Cell, recipes: dict[str, Recipe], seeds: range, store: Path) -> dict[str, Any]:
    """Method -> gold reward at each KL [S, KLs], and reward and KL as trained [S], on the test seeds."""
    equal: list[np.ndarray] = []
    reward: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    for start in range(seeds.start, seeds.stop, BLOCK):
        part = range(start, min(start + BLOCK, seeds.stop))
        world = draw_world(cell, part)
        theta = policies(cell, world, list(recipes.values()), part, store)
        equal.append(rewards(world, theta, part, KLS))
        for seed, gold, one in zip(part, world.gold, theta, strict=True):
            gained, at = reward_and_kl(one, gold, prompts_of(seed))
            reward.append(gained)
            kl.append(at)
    found = np.concatenate(equal).round(5)
    return {
        name: {
            "equal": found[:, :, k].tolist(),
            "reward": np.array(reward)[:, k].round(5).tolist(),
            "kl": np.array(kl)[:, k].round(5).tolist(),
        }
        for k, name in enumerate(recipes)
    }


def run_cell(cell: Cell, seeds: int, store: Path) -> dict[str, Any]:
    """Choose candidates on validation seeds, judge them on test seeds."""
    start = time.monotonic()
    chosen = choose(cell, store)
    recipes = {name: recipe for name, (recipe, _) in chosen.items()}
    untuned = {f"untuned {name}": recipe for name, recipe in UNTUNED.items()}
    found = judge(cell, {**recipes, **untuned}, range(seeds), store)
    return {
        "key": key(seeds),
        "cell": cell.to_dict(),
        "seeds": seeds,
        "kls": KLS,
        "chosen": {name: dict(recipes[name].loss.parameters) for name in chosen},
        "validation": {name: values.round(5).tolist() for name, (_, values) in chosen.items()},
        "found": found,
        "versions": versions(),
        "seconds": time.monotonic() - start,
    }


def key(seeds: int) -> str:
    """Digest of everything but the code that a cell's numbers come from; a cell with another key is computed again."""
    tried = [
        (name, recipe.labels, recipe.part, dict(recipe.loss.parameters))
        for name, method in METHODS.items()
        for recipe in [*method.first(), *method.then(0)]
    ]
    return digest([tried, list(UNTUNED), list(VALIDATION), CHOICE_KL, KLS, BLOCK, seeds])


def cell_file(folder: Path, cell: Cell) -> Path:
    """File of a cell."""
    name = f"{cell.pairs}-{round(100 * cell.flips)}-{cell.spread}-{cell.error}".replace(" ", "_")
    return folder / f"{name}.json"


def main() -> None:
    """Compute the missing cells; write tables and plots of all cells there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce-arena"))
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--pairs", nargs="*", type=int, default=[400, 100, 1600], help="only cells of these sizes")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further cell after this time")
    parser.add_argument("--document", type=Path, help="page whose tables to replace, e.g. docs/results.md")
    arguments = parser.parse_args()
    configure()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in cells() if cell.pairs in arguments.pairs]
    end = time.monotonic() + 60 * arguments.minutes
    for number, cell in enumerate(wanted, start=1):
        file = cell_file(arguments.output, cell)
        if file.exists() and read_json(file)["key"] == key(arguments.seeds):
            continue
        if time.monotonic() > end:
            break
        found = run_cell(cell, arguments.seeds, arguments.output / "without-margins")
        write_json(file, found)
        log.info("%d of %d cells: %s, %.0f s", number, len(wanted), cell.name, found["seconds"])
    files = [cell_file(arguments.output, cell) for cell in wanted]
    summary = summarize([read_json(file) for file in files if file.exists()])
    write_json(arguments.output / "table.json", summary)
    small = arguments.output / "arena.json"
    small.write_text(json.dumps(compact(summary), separators=(",", ":")) + "\n", encoding="utf-8")
    print(markdown(summary))
    if arguments.document:
        update_page(arguments.document, markdown(summary), MARK)
    draw_plots(summary, arguments.output)


if __name__ == "__main__":
    main()
