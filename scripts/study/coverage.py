"""How often the 95% intervals of align/stats.py and of what is built on it hold the truth, by simulation.

    python -m scripts.study.coverage --draws 2000 --output studies/coverage.json --document docs/evaluation.md

Draws in which the data give no interval (all values equal) are counted apart.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from align.evaluation.ranking import auc_interval
from align.evaluation.rewards import gain_per_root_kl
from align.evaluation.winrate import length_control
from align.stats import correlation, mean_interval, share_interval
from scripts.tables import table, update_page

MARK = "scripts/study/coverage.py"
SIZES = (5, 8, 12, 20, 60, 200)
Draw = Callable[[np.random.Generator, int], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One estimator on one kind of data."""

    draw: Draw
    """(generator, number of units) -> an estimate, or None if it is not defined."""
    truth: float
    least: float = 0.93
    """Lowest coverage at any size; below 0.93 where the size says too little of the data's tail."""


def _clustered(rng: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    which = np.repeat(np.arange(units), rng.integers(1, 9, units))
    return rng.normal(size=units)[which] + rng.normal(size=which.size), which


def _clustered_share(rng: np.random.Generator, units: int) -> Any:
    noise, which = _clustered(rng, units)
    return share_interval(noise < norm.ppf(0.7) * np.sqrt(2), clusters=which)


def _clustered_mean(rng: np.random.Generator, units: int) -> Any:
    values, which = _clustered(rng, units)
    return mean_interval(values, clusters=which)


def _one_large(rng: np.random.Generator, units: int) -> Any:
    """One cluster has half of all observations."""
    which = np.repeat(np.arange(units), [2 * units - 2, *[2] * (units - 1)])
    return mean_interval(rng.normal(size=units)[which] + rng.normal(size=which.size), clusters=which)


def _correlated(rng: np.random.Generator, units: int) -> Any:
    x, noise = rng.normal(size=(2, units))
    return correlation(x, 0.6 * x + 0.8 * noise)


def _ranked(rng: np.random.Generator, units: int) -> Any:
    common = rng.normal(0, np.sqrt(0.9), units)
    return auc_interval(common + rng.normal(1.5, 1, units), common + rng.normal(0, 1, units))


def _length_controlled(rng: np.random.Generator, units: int) -> Any:
    difference = rng.normal(size=units)
    logit = 0.4 + np.tanh(difference / difference.std())
    found = length_control((rng.random(units) < 1 / (1 + np.exp(-logit))).astype(float), difference)
    return None if found is None else found.rate


CASES = {
    "mean, normal": Case(lambda rng, n: mean_interval(rng.normal(size=n)), 0.0),
    "mean, exponential": Case(lambda rng, n: mean_interval(rng.exponential(size=n)), 1.0, 0.92),
    "mean, log-normal": Case(lambda rng, n: mean_interval(rng.lognormal(size=n)), float(np.exp(0.5)), 0.88),
    "mean, 10% not zero": Case(
        lambda rng, n: mean_interval((rng.random(n) < 0.1) * rng.lognormal(size=n)), 0.1 * float(np.exp(0.5)), 0.92
    ),
    "mean, 30% not zero": Case(
        lambda rng, n: mean_interval((rng.random(n) < 0.3) * rng.lognormal(size=n)), 0.3 * float(np.exp(0.5))
    ),
    "mean, ties": Case(lambda rng, n: mean_interval(rng.choice([-1.0, 0, 1], n, p=[0.2, 0.5, 0.3])), 0.1),
    "mean, clusters": Case(_clustered_mean, 0.0, 0.92),
    "mean, one large cluster": Case(_one_large, 0.0),
    "share 0.1": Case(lambda rng, n: share_interval(rng.random(n) < 0.1), 0.1, 0.91),
    "share 0.5": Case(lambda rng, n: share_interval(rng.random(n) < 0.5), 0.5, 0.92),
    "share, clusters": Case(_clustered_share, 0.7, 0.92),
    "win rate": Case(lambda rng, n: share_interval(rng.choice([0, 0.5, 1], n, p=[0.2, 0.3, 0.5])), 0.65),
    "win rate, many ties": Case(lambda rng, n: share_interval(rng.choice([0, 0.5, 1], n, p=[0.1, 0.8, 0.1])), 0.5),
    "win rate at equal lengths": Case(_length_controlled, float(1 / (1 + np.exp(-0.4))), 0.91),
    "gain per sqrt(2 KL)": Case(lambda rng, n: gain_per_root_kl(rng.normal(1, 1, n), rng.gamma(4, 0.5, n)), 0.5, 0.92),
    "correlation": Case(_correlated, 0.6),
    "AUC": Case(_ranked, float(norm.cdf(1.5 / np.sqrt(2 * 1.9))), 0.91),
}


def covered(case: Case, size: int, draws: int, *, seed: int) -> float | None:
    """Share of the intervals of ``draws`` data sets of ``size`` units that hold the truth; None if none has one."""
    inside = [one for one in simulate(case, size, draws, seed=seed) if one is not None]
    return float(np.mean(inside)) if inside else None


def simulate(case: Case, size: int, draws: int, *, seed: int) -> list[bool | None]:
    """For each data set, whether its interval holds the truth; None where the data give no interval."""
    rng = np.random.default_rng(seed)
    inside: list[bool | None] = []
    for _ in range(draws):
        found = case.draw(rng, size)
        values: dict[str, Any] = {"low": None}
        if found is not None:
            values = found if isinstance(found, dict) else found.to_dict()
        none = values["low"] is None
        inside.append(None if none else bool(values["low"] - 1e-9 <= case.truth <= values["high"] + 1e-9))
    return inside


def markdown(found: dict[str, Any]) -> str:
    """The coverage of each case by number of units; ``-`` where no data set has an interval."""
    rows = [
        [name, *("-" if row["covered"] is None else f"{row['covered']:.1%}" for row in sizes.values())]
        for name, sizes in found["coverage"].items()
    ]
    return table(["95% interval of", *(f"{size} units" for size in SIZES)], rows)


def main() -> None:
    """Print the table and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--document", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    results: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, case in CASES.items():
        results[name] = {}
        for size in SIZES:
            inside = simulate(case, size, arguments.draws, seed=size)
            some = [one for one in inside if one is not None]
            results[name][str(size)] = {
                "covered": float(np.mean(some)) if some else None,
                "no_interval": 1 - len(some) / len(inside),
            }
        shown = (f"{size}: {'-' if row['covered'] is None else format(row['covered'], '.1%')}"
                 for size, row in results[name].items())  # fmt: skip
        print(name, *shown, sep="  ")
    found = {"draws": arguments.draws, "command": "python -m scripts.study.coverage", "coverage": results}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.document is not None:
        update_page(arguments.document, markdown(found), MARK)


if __name__ == "__main__":
    main()
