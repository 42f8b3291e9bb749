"""What do the votes of many raters teach a reward model, next to their majority and next to one rater? Real ratings.

Protocol, fixed before any result: snippets with at least 15 ratings, 2,000 of them held out. A pair is two snippets;
its 15 votes compare the k-th rating of one with the k-th of the other, both in random order, so a vote is for the
first, for the second or a tie. Pairs with as many votes for either side are drawn again, so that every way of labeling
has the same pairs. The ways: all votes (``binomial``; a tie is half a vote for each), the majority (``bradley_terry``),
the first vote that is no tie (``bradley_terry``), and the votes with ties as a class of their own (``rao_kupper``, its
parameter fitted with the head). A linear head on the frozen features of MiniLM is fitted to each; its penalty is the
one with the least loss of its own in five folds. A seed draws the held-out snippets, the pairs and the order of the
ratings.

The number that decides: accuracy on 4,000 pairs of held-out snippets, against the sign of the difference of the mean of
all ratings (equal means are left out). Second: mean log-loss of the held-out votes that are no ties, which punishes
margins that are too large. Differences to the majority are paired by seed, with Student's t over the seeds.

    nice -n 15 python -m scripts.study.votes --output studies/votes.json
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import t as student
from torch import Tensor

from align.filtering.embeddings import embed
from align.io.console import configure
from align.io.files import write_json
from reward_models import objectives, vote_objectives
from reward_models.linear_heads import PENALTIES
from scripts.assets.demo_data import read_snippets

RATERS, HELD_OUT, TEST_PAIRS, FOLDS = 15, 2000, 4000, 5
WAYS = ("votes", "ties", "majority", "one rater")
BASELINE = "majority"
Votes = np.ndarray
"""int64 [N, 3]: for the first snippet, for the second, ties."""


def draw_pairs(ratings: np.ndarray, pool: np.ndarray, count: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """(places int64 [N, 2], votes [N, 3], sign of the first vote that is no tie [N]) of pairs without even votes.

    Args:
        ratings: [S, RATERS].
        pool: places of the snippets to draw from.
        count: N.
        rng: draws snippets and the order of their ratings.
    """
    places = np.stack([rng.choice(pool, 2, replace=False) for _ in range(4 * count)])
    first, second = (rng.permuted(ratings[places[:, side]], axis=1) for side in (0, 1))
    signs = np.sign(first - second)
    votes = np.stack([(signs > 0).sum(axis=1), (signs < 0).sum(axis=1), (signs == 0).sum(axis=1)], axis=1)
    kept = np.flatnonzero(votes[:, 0] != votes[:, 1])[:count]
    single = np.array([row[np.flatnonzero(row)[0]] for row in signs[kept]])
    return places[kept], votes[kept], single


def loss_of(way: str, votes: Votes, single: np.ndarray) -> Callable[[Tensor, Tensor], Tensor]:
    """(z [N], logarithm of the tie parameter) -> loss [N] of one way of labeling."""
    chosen, rejected, ties = torch.from_numpy(votes.astype(np.float64)).T
    sign = torch.from_numpy((single if way == "one rater" else np.sign(votes[:, 0] - votes[:, 1])).astype(np.float64))

    def loss(z: Tensor, tie: Tensor) -> Tensor:
        zero = torch.zeros_like(z)
        if way == "votes":
            return vote_objectives.binomial(z, zero, chosen, rejected, ties)
        if way == "ties":
            return vote_objectives.rao_kupper(z, zero, chosen, rejected, ties, tie=tie.exp())
        return objectives.bradley_terry(sign * z, zero)

    return loss


def fit(x: np.ndarray, loss: Callable[[Tensor, Tensor], Tensor], penalty: float) -> np.ndarray:
    """Head and logarithm of the tie parameter [D + 1] that minimize the sum of the loss + penalty |w|^2 / 2."""
    features = torch.from_numpy(x)

    def value(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        both = torch.from_numpy(parameters).requires_grad_()
        w = both[:-1]
        total = loss(features @ w, both[-1]).sum() + penalty * (w @ w) / 2
        (gradient,) = torch.autograd.grad(total, both)
        return float(total.detach()), gradient.numpy()

    start = np.append(np.zeros(x.shape[1]), np.log(0.5))
    found: np.ndarray = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return found


def fit_best(x: np.ndarray, way: str, votes: Votes, single: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Head [D] at the penalty with the least loss of held-out folds."""
    fold = rng.permutation(len(x)) % FOLDS
    totals: Mapping[float, float] = {
        penalty: sum(_fold_loss(x, way, votes, single, fold == k, penalty) for k in range(FOLDS))
        for penalty in PENALTIES
    }
    best = min(PENALTIES, key=lambda penalty: totals[penalty])
    return fit(x, loss_of(way, votes, single), best)[:-1]


def _fold_loss(x: np.ndarray, way: str, votes: Votes, single: np.ndarray, inside: np.ndarray, penalty: float) -> float:
    found = fit(x[~inside], loss_of(way, votes[~inside], single[~inside]), penalty)
    z, tie = torch.from_numpy(x[inside] @ found[:-1]), torch.tensor(found[-1])
    return float(loss_of(way, votes[inside], single[inside])(z, tie).sum())


def run_seed(seed: int, budget: int, features: np.ndarray, ratings: np.ndarray) -> dict[str, dict[str, float]]:
    """Way -> accuracy and log-loss on held-out snippets."""
    rng = np.random.default_rng([seed, budget])
    order = rng.permutation(len(ratings))
    train, votes, single = draw_pairs(ratings, order[HELD_OUT:], budget, rng)
    test, held, _ = draw_pairs(ratings, order[:HELD_OUT], TEST_PAIRS, rng)
    mean = ratings.mean(axis=1)
    gold = np.sign(mean[test[:, 0]] - mean[test[:, 1]])
    x, own = (features[places[:, 0]] - features[places[:, 1]] for places in (train, test))
    found = {}
    for way in WAYS:
        z = own @ fit_best(x, way, votes, single, np.random.default_rng(seed))
        right = np.where(z == 0, 0.5, np.sign(z) == gold)[gold != 0]
        costs = held[:, 0] * np.logaddexp(0, -z) + held[:, 1] * np.logaddexp(0, z)
        found[way] = {"accuracy": float(right.mean()), "log_loss": float(costs.sum() / held[:, :2].sum())}
    return found


def summary(cells: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Way -> mean of each number, and its paired difference to ``BASELINE`` with a 95% interval over the seeds."""
    found: dict[str, Any] = {}
    for way in WAYS:
        found[way] = {}
        for number in ("accuracy", "log_loss"):
            values = np.array([cell[way][number] for cell in cells])
            gaps = values - np.array([cell[BASELINE][number] for cell in cells])
            half = float(student.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
            gap = float(gaps.mean())
            found[way][number] = {"mean": float(values.mean()), "difference": [gap, gap - half, gap + half]}
    return found


def main() -> None:
    """Run every budget and seed, and write the cells and their summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snippets", type=Path, default=Path(".assets/snippets"))
    parser.add_argument("--model", default=".assets/minilm", help="encoder whose frozen embeddings are the features")
    parser.add_argument("--budgets", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    configure()
    snippets = [one for one in read_snippets(arguments.snippets) if len(one.ratings) >= RATERS]
    ratings = np.array([one.ratings[:RATERS] for one in snippets], dtype=np.float64)
    features = embed([one.text for one in snippets], arguments.model).astype(np.float64)
    result: dict[str, Any] = {"snippets": len(snippets), "raters": RATERS, "seeds": arguments.seeds, "budgets": {}}
    for budget in arguments.budgets:
        cells = [run_seed(seed, budget, features, ratings) for seed in range(arguments.seeds)]
        result["budgets"][str(budget)] = {"cells": cells, "summary": summary(cells)}
        write_json(arguments.output, result)
        print(budget, {way: {name: one["difference"] for name, one in numbers.items()}
                       for way, numbers in result["budgets"][str(budget)]["summary"].items()}, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
