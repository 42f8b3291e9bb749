"""Which rule of the literature chooses pairs that teach more than random ones, and under which errors of labels?

The world is the exact arena (scripts/reproduce/exact_arena): a gold reward linear in 20 features, 1,600 pairs, policies
compared by their exact gold reward at KL 0.5 to the reference. Labels are Bradley-Terry draws of gold (``clean``), with
20 or 40% of them flipped, drawn of gold plus a direction of the same size that all labels share (``shared``), or
reversed in one of five sources (``source``). Margins are own (cross-fitted on these labels), or an outside reward
model's, with an independent or a shared error of standard deviation 2, that of the gold margin.

    small |h|       smallest size of the implicit gap h, cross-fitted (Difficulty, arXiv 2508.04149)
    small h         smallest signed h, as that paper's formula is often run
    gap and margin  largest sum of h and margin: product of the two preference odds (BeeS, arXiv 2502.14560)
    easy half       least validation loss, mean over 3 divisions in cross-fitted halves (SelectiveDPO, arXiv 2502.09650)
    RIP             rejected reward above and margin below a threshold, the same quantile of both (arXiv 2501.18578;
                    responses of the arena have no length, its third threshold)
    margin          largest margin
    FiFA            margin + 0.5 quality + 0.5 diversity, standardized; quality is noise here (arXiv 2410.10166)
    random          the control

Fixed beforehand. Every rule keeps 20, 50 and 80% of the pairs; the ridge per pair is that of all pairs, chosen by
cross-validation on them. The outcome is the paired difference in gold reward from a random part of the same size, with
its 95% interval over the seeds; a rule holds in a cell if the interval is above 0, does harm if it is below. The two
that lead are those with the largest mean difference over all cells at 50%. Beside it, the penalty that cross-validation
on the kept half alone would have chosen, and the gold reward with it.

A cell is one JSON file under --output and is not computed again.

    python -m scripts.study.selection_rules --seeds 100
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from align.filtering.knn.search import kth_distance
from align.filtering.scores import diversity
from align.filtering.selection import importance, top_k
from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.stats import mean_interval
from align.trust.linear_proxy import log_sigmoid, scaled
from align.trust.weighted_heads import PENALTIES, choose_penalty, fit_weighted
from scripts.reproduce.exact_arena.gold import GOLD_SPREAD, SIZE, draw_gold, gold_reward
from scripts.reproduce.exact_arena.pool import NEIGHBOURS, WEIGHTS
from scripts.reproduce.exact_arena.world import NOISE, prefer
from scripts.tables import compact, table, update_page

MARK = "scripts/study/selection_rules.py"
PAIRS, SOURCES, FOLDS, DIVISIONS, KL = 1600, 5, 5, 3, 0.5
LABELS = ("clean", "flips 20", "flips 40", "shared", "source")
MARGINS = ("own", "outside independent", "outside shared")
KEEPS = (0.2, 0.5, 0.8)
FIRST = 1000
"""First seed; a trial of the script ran on the seeds 0 and 1."""
RULES = ("small |h|", "small h", "gap and margin", "easy half", "RIP", "margin", "FiFA", "random")
VERSION = 1
"""Part of a cell's key: raise it when the same cell gives other numbers."""


def draw_labels(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Responses [N, 2, D] of the pairs, the chosen one first, and the gold direction [D]."""
    gold = draw_gold(rng)
    x = rng.normal(size=(PAIRS, 2, SIZE))
    truth = gold + _direction(rng, GOLD_SPREAD) if kind == "shared" else gold
    flips = float(kind.split()[1]) / 100 if kind.startswith("flips") else 0.0
    prefer(x, expit((x[:, 0] - x[:, 1]) @ truth), flips, rng)
    if kind == "source":
        wrong = np.arange(PAIRS) % SOURCES == 0
        x[wrong] = x[wrong, ::-1]
    return x, gold


def draw_rewards(kind: str, x: np.ndarray, gold: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rewards [N, 2] of the reward model that the rules read.

    Args:
        kind: one of ``MARGINS``.
        x: responses [N, 2, D].
        gold: [D].
        own: cross-fitted heads of every pair, [N, D].
        rng: of the errors.
    """
    if kind == "own":
        rewards: np.ndarray = np.einsum("nrd,nd->nr", x, own)
        return rewards
    if kind == "outside shared":
        outside: np.ndarray = x @ (gold + _direction(rng, NOISE))
        return outside
    return x @ gold + NOISE / np.sqrt(2) * rng.normal(size=x.shape[:2])


def _direction(rng: np.random.Generator, spread: float) -> np.ndarray:
    """A direction [D] whose differences of two responses have this standard deviation."""
    drawn: np.ndarray = rng.normal(size=SIZE)
    return drawn * (spread / np.sqrt(2) / np.linalg.norm(drawn))


def cross_fitted(x: np.ndarray, fold: np.ndarray, penalty: float) -> np.ndarray:
    """The head of the other folds for every pair, [N, D]; one call fits all folds."""
    heads = fit_weighted(x, (fold[:, None] != np.unique(fold)).astype(np.float64), penalty)
    return heads.T[fold]


def draw_scores(
    x: np.ndarray, gap: np.ndarray, rewards: np.ndarray, penalty: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Score [N] of every pair under every rule; the highest are kept.

    Args:
        x: responses [N, 2, D].
        gap: implicit gaps h [N], cross-fitted.
        rewards: [N, 2].
        penalty: ridge per pair.
        rng: of the divisions, the quality, and the random rule.
    """
    margin, difference = rewards[:, 0] - rewards[:, 1], x[:, 0] - x[:, 1]
    losses = np.zeros(len(x))
    for _ in range(DIVISIONS):
        halves = rng.permutation(len(x)) % 2
        losses -= log_sigmoid(np.einsum("nd,nd->n", difference, cross_fitted(difference, halves, penalty)))
    both = x.sum(axis=1)
    vectors = (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float32)
    columns = {
        "margin": margin,
        "quality": rng.normal(size=len(x)),
        "diversity": diversity(kth_distance(vectors, NEIGHBOURS, seed=0).distance),
    }
    return {
        "small |h|": -np.abs(gap),
        "small h": -gap,
        "gap and margin": gap + margin,
        "easy half": -losses,
        "RIP": np.minimum(rankdata(rewards[:, 1]), rankdata(-margin)),
        "margin": margin,
        "FiFA": importance(columns, WEIGHTS["filtered"]),
        "random": rng.random(len(x)),
    }


def run_seed(labels: str, margins: str, seed: int) -> dict[str, Any]:
    """Gold rewards of all pairs and of every part, of one seed; cells of one kind of labels share the pairs."""
    rng = np.random.default_rng([seed, LABELS.index(labels)])
    x, gold = draw_labels(labels, rng)
    difference = scaled(x[:, 0] - x[:, 1])
    fold = rng.permutation(PAIRS) % FOLDS
    penalty = choose_penalty(difference, fold)
    own = cross_fitted(difference, fold, penalty)
    gap = np.einsum("nd,nd->n", difference, own)
    others = np.random.default_rng([seed, LABELS.index(labels), 1 + MARGINS.index(margins)])
    rewards = draw_rewards(margins, x, gold, own, others)
    scores = draw_scores(x, gap, rewards, penalty, np.random.default_rng([seed, 100]))
    names = np.arange(PAIRS)
    kept = np.zeros((PAIRS, 1 + len(RULES) * len(KEEPS)), dtype=bool)
    kept[:, 0] = True
    for k, (rule, keep) in enumerate(product(RULES, KEEPS), start=1):
        kept[top_k(scores[rule], names, round(keep * PAIRS)), k] = True
    half = [1 + RULES.index(rule) * len(KEEPS) + KEEPS.index(0.5) for rule in RULES]
    selected = [choose_penalty(difference, fold, kept[:, k]) for k in half]
    weights = kept.astype(np.float64)
    heads = fit_weighted(
        difference, np.concatenate([weights, weights[:, half]], axis=1),
        np.concatenate([np.full(weights.shape[1], penalty), selected]),
    )  # fmt: skip
    gained = gold_reward(heads, gold, np.random.default_rng([seed, 1]), (KL,))[0]
    return {
        "all": float(gained[0]),
        "kept": np.reshape(gained[1 : weights.shape[1]], (len(RULES), len(KEEPS))).round(5).tolist(),
        "penalty": penalty,
        "selected_penalty": selected,
        "selected": gained[weights.shape[1] :].round(5).tolist(),
    }


def run_cell(labels: str, margins: str, seeds: int) -> dict[str, Any]:
    """All seeds of a cell."""
    start = time.monotonic()
    found = [run_seed(labels, margins, seed) for seed in range(FIRST, FIRST + seeds)]
    return {
        "version": VERSION, "seeds": seeds, "labels": labels, "margins": margins,
        **{name: [one[name] for one in found] for name in found[0]}, "seconds": time.monotonic() - start,
    }  # fmt: skip


def summarize(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired differences with intervals of every cell, and the means over the cells."""
    rows = []
    for cell in cells:
        kept, whole = np.array(cell["kept"]), np.array(cell["all"])
        random = kept[:, RULES.index("random")]
        selected = np.array(cell["selected"]) - kept[:, :, KEEPS.index(0.5)]
        penalties = np.array(cell["selected_penalty"])
        for k, rule in enumerate(RULES):
            rows.append({
                "labels": cell["labels"], "margins": cell["margins"], "rule": rule,
                "all": mean_interval(whole).to_dict(),
                "from_random": [mean_interval(kept[:, k, j] - random[:, j]).to_dict() for j in range(len(KEEPS))],
                "from_all": [mean_interval(kept[:, k, j] - whole).to_dict() for j in range(len(KEEPS))],
                "smallest_penalty": float((penalties[:, k] == PENALTIES[0]).mean()),
                "smallest_penalty_all": float((np.array(cell["penalty"]) == PENALTIES[0]).mean()),
                "selected_penalty": mean_interval(selected[:, k]).to_dict(),
            })  # fmt: skip
    means = {
        rule: float(np.mean([one["from_random"][KEEPS.index(0.5)]["value"] for one in rows if one["rule"] == rule]))
        for rule in RULES
    }
    return {"keeps": KEEPS, "kl": KL, "pairs": PAIRS, "seeds": cells[0]["seeds"], "means": means, "rows": rows}


def markdown(summary: dict[str, Any]) -> str:
    """The table of differences from a random part of the same size; bold where the interval excludes 0."""
    rows = []
    for labels, margins in product(LABELS, MARGINS):
        found = {one["rule"]: one for one in summary["rows"] if (one["labels"], one["margins"]) == (labels, margins)}
        if found:
            cells = ["  ".join(_shown(one) for one in found[rule]["from_random"]) for rule in RULES[:-1]]
            rows.append([labels, margins, *cells])
    means = [f"{summary['means'][rule]:+.3f}" for rule in RULES[:-1]]
    return table(
        ["labels", "margins", *(rule.replace("|", "\\|") for rule in RULES[:-1])], [*rows, ["mean at 50%", "", *means]]
    )


def _shown(estimate: dict[str, Any]) -> str:
    text = f"{estimate['value']:+.3f}"
    low, high = estimate["low"], estimate["high"]
    return f"**{text}**" if low is not None and not low <= 0 <= high else text


def main() -> None:
    """Compute the missing cells; write the table of all there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study-selection-rules"))
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--document", type=Path, help="page whose table to replace, e.g. docs/checked-pairs.md")
    arguments = parser.parse_args()
    configure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cells = []
    for margins, labels in product(MARGINS, LABELS):
        file = arguments.output / f"{labels}-{margins}.json".replace(" ", "_")
        found = read_json(file) if file.exists() else {}
        if (found.get("version"), found.get("seeds")) != (VERSION, arguments.seeds):
            found = run_cell(labels, margins, arguments.seeds)
            write_json(file, found)
            log.info("labels %s, margins %s: %.0f s", labels, margins, found["seconds"])
        cells.append(found)
    summary = summarize(cells)
    small = arguments.output / "selection_rules.json"
    small.write_text(compact(summary), encoding="utf-8")
    print(markdown(summary))
    if arguments.document:
        update_page(arguments.document, markdown(summary), MARK)


if __name__ == "__main__":
    main()
