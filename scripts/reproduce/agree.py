"""Do cells that were computed again, here or on another machine, agree with those kept in studies/?

Two cells.jsonl: cells with the same key were made by the same command from the same inputs. `agrees` tells whether the
new mean gold reward lies in the old 95% interval over the prompts, `same` on how many prompts the reward is identical.
Two arena.json: whether each method's new difference to DPO lies in its old interval. Prints a line of JSON for each
cell that both files have; exits with 1 if one of them does not agree.

    python -m scripts.reproduce.policy --candidates 1 --margins cross-fitted --qualities high --methods dpo --seeds 0 \\
        --train-prompts 256 --validation-prompts 96 --test-prompts 128 --temperatures 0.7 1 --output runs/again
    python -m scripts.reproduce.agree studies/policy/cells.jsonl runs/again/cross-fitted/cells.jsonl

    python -m scripts.reproduce.arena --pairs 100 --output runs/arena-again
    python -m scripts.reproduce.agree studies/arena.json runs/arena-again/arena.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from align.io.files import read_json
from scripts.bootstrap import bootstrap_mean
from scripts.reproduce.exact_arena.report import MAIN_KL
from scripts.reproduce.policy_protocol.data import read_known


def rewards(cell: dict[str, Any]) -> np.ndarray:
    """Gold reward [N] of one completion of each prompt at temperature 1."""
    return np.array(cell["decoded"]["1"]["reward"] if "decoded" in cell else cell["reward"])


def compare_cells(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Compare two computations of the cell of a trained policy."""
    old, new = rewards(before), rewards(now)
    interval = bootstrap_mean(old, seed=0)
    names = ("quality", "method", "flipped", "arm", "loss", "seed", "split", "parameters")
    return {name: before[name] for name in names if name in before} | {
        "reward": interval.to_dict(),
        "again": float(new.mean()),
        "same": int((old == new).sum()),
        "prompts": len(old),
        "agrees": bool(interval.low <= new.mean() <= interval.high),
    }


def compare_rows(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Compare two computations of a cell of the arena."""
    old, new = (row["difference"][f"{MAIN_KL:g}"] for row in (before, now))
    methods = [name for name, value in old.items() if isinstance(value, list)]
    inside = [name for name in methods if old[name][1] <= new[name][0] <= old[name][2]]
    return before["cell"] | {
        "methods": len(methods),
        "inside": len(inside),
        "furthest": max(abs(old[name][0] - new[name][0]) for name in methods),
        "agrees": len(inside) == len(methods),
    }


def cell_differences(known: Path, again: Path) -> list[dict[str, Any]]:
    """The comparison of every cell that both files have."""
    if known.suffix == ".json":
        old, new = ({json.dumps(row["cell"]): row for row in read_json(file)["rows"]} for file in (known, again))
        return [compare_rows(row, new[name]) for name, row in old.items() if name in new]
    before, now = read_known([known]), read_known([again])
    return [compare_cells(cell, now[key]) for key, cell in before.items() if key in now]


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("known", type=Path, help="cells.jsonl, or the arena's arena.json")
    parser.add_argument("again", type=Path, help="the same file, computed again")
    arguments = parser.parse_args()
    found = cell_differences(arguments.known, arguments.again)
    for one in found:
        print(json.dumps(one))
    if not found:
        parser.error("the files have no cell in common")
    sys.exit(0 if all(one["agrees"] for one in found) else 1)


if __name__ == "__main__":
    main()
