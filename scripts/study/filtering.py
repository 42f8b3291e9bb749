"""Does filtering beat a random subset of the same size? Human-rated snippets, labels flipped at a known rate.

A pair is two snippets; gold says that the one with the higher mean rating (15 to 20 people) is better, and a known
share of the labels is flipped. Margins are cross-fitted: a logistic head on differences of frozen embeddings, trained
on the noisy labels of the other folds. Then the same head is trained on each subset and judged on clean pairs of
snippets that it has not seen. Every cell (share flipped, seed) is one JSON file that is not computed again.

    python -m scripts.study.filtering run --flipped 0 0.2 0.3 0.4 --seeds 10
    python -m scripts.study.filtering table
    python -m scripts.study.filtering encoders
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from align.errors import AlignError
from align.filtering.embeddings import Encoder, embed
from align.filtering.knn.search import kth_distance
from align.filtering.quality import Screen
from align.filtering.scores import diversity, doubtful
from align.filtering.selection import importance, top_k
from align.filtering.static_embeddings import StaticEncoder
from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.stats import ends
from scripts.assets.demo_data import Snippet, read_snippets
from scripts.bootstrap import bootstrap_mean
from scripts.figures import pyplot, save
from scripts.tables import table

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 5
NEIGHBOURS = 5
WEIGHTS = {
    "filtered": {"margin": 1.0, "quality": 0.5, "diversity": 0.5},
    "margin": {"margin": 1.0},
    "quality": {"quality": 1.0},
    "diversity": {"diversity": 1.0},
    "margin + quality": {"margin": 1.0, "quality": 0.5},
    "margin + diversity": {"margin": 1.0, "diversity": 0.5},
}
KEEPS = (0.05, 0.1, 0.2, 0.4)
MAIN_KEEP = 0.1
FEW = 60


@dataclass(frozen=True, slots=True)
class Pool:
    """Pairs of snippets: features, and scores that need no label."""

    features: np.ndarray
    """[N, D], embedding of the snippet listed as chosen minus that of the other, before any flip."""
    quality: np.ndarray
    diversity: np.ndarray


def fit(features: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """Weights [D] of a logistic regression without intercept, by Newton's method.

    Minimizes sum_i softplus(z_i) - targets_i z_i + ridge / 2 |w|^2 with z = features w; targets lie in [0, 1]. Swapping
    the responses of a pair (features and z change sign, the target becomes 1 - target) does not change the loss.
    """
    weights = np.zeros(features.shape[1])
    for _ in range(30):
        z = features @ weights
        p = 1.0 / (1.0 + np.exp(-z))
        gradient = features.T @ (p - targets) + ridge * weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features
        hessian[np.diag_indices_from(hessian)] += ridge
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-6 * max(np.abs(weights).max(), 1e-3):
            break
    return weights


def choose_ridge(features: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> float:
    """The ridge with the lowest log-loss on a random fifth of the rows, which the fit does not see."""
    held = rng.permutation(len(features)) < max(len(features) // 5, 1)
    losses = []
    for ridge in RIDGES:
        z = features[held] @ fit(features[~held], targets[~held], ridge)
        losses.append(float(np.mean(np.logaddexp(0.0, z) - targets[held] * z)))
    return RIDGES[int(np.argmin(losses))]


def cross_fitted_margins(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Margins [N] of the labeled pairs, each from a head trained on the other folds."""
    ones = np.ones(len(features))
    ridge = choose_ridge(features, ones, rng)
    fold = rng.permutation(len(features)) % FOLDS
    margins = np.empty(len(features))
    for k in range(FOLDS):
        margins[fold == k] = features[fold == k] @ fit(features[fold != k], ones[fold != k], ridge)
    return margins


def held_out_accuracy(features: np.ndarray, targets: np.ndarray, clean: np.ndarray, rng: np.random.Generator) -> float:
    """Accuracy on clean pairs, whose first snippet is better, of a head trained on ``features`` and ``targets``."""
    z = clean @ fit(features, targets, choose_ridge(features, targets, rng))
    return float(np.mean(np.where(z == 0, 0.5, z > 0)))


def draw_pairs(snippets: list[Snippet], places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices [count, 2] of snippets whose mean ratings differ, the better one first."""
    pairs = rng.choice(places, size=(2 * count, 2))
    means = np.array([snippet.mean for snippet in snippets])
    pairs = pairs[means[pairs[:, 0]] != means[pairs[:, 1]]][:count]
    worse_first = means[pairs[:, 0]] < means[pairs[:, 1]]
    pairs[worse_first] = pairs[worse_first][:, ::-1]
    return pairs


def make_pool(snippets: list[Snippet], vectors: np.ndarray, pairs: np.ndarray, seed: int) -> Pool:
    """Features and label-free scores of the pairs; diversity is that of the sum of both embeddings."""
    both = vectors[pairs[:, 0]] + vectors[pairs[:, 1]]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    texts = [[snippets[k].text for k in pairs[:, side]] for side in (0, 1)]
    quality = np.minimum(*(Screen().score([""] * len(side), side) for side in texts))
    spread = diversity(kth_distance(both, NEIGHBOURS, seed=seed).distance)
    return Pool((vectors[pairs[:, 0]] - vectors[pairs[:, 1]]).astype(np.float64), quality, spread)


def run_cell(
    snippets: list[Snippet], vectors: np.ndarray, flipped: float, repeated: float, seed: int, count: int
) -> dict[str, Any]:
    """All subsets at one share of flipped labels and seed; a share ``repeated`` of the pairs uses ``FEW`` snippets."""
    start = time.monotonic()
    rng = np.random.default_rng([seed, int(1000 * flipped)])
    order = np.random.default_rng(seed).permutation(len(snippets))
    cut = len(snippets) * 7 // 10
    often = round(repeated * count)
    pairs = np.concatenate(
        [draw_pairs(snippets, order[:FEW], often, rng), draw_pairs(snippets, order[:cut], count - often, rng)]
    )
    pool = make_pool(snippets, vectors, pairs, seed)
    held = draw_pairs(snippets, order[cut:], 2000, rng)
    clean = (vectors[held[:, 0]] - vectors[held[:, 1]]).astype(np.float64)
    wrong = rng.permutation(count) < round(flipped * count)
    labeled = pool.features * np.where(wrong, -1.0, 1.0)[:, None]
    margins = cross_fitted_margins(labeled, rng)
    flagged = doubtful(margins)
    soft, hard = 1.0 / (1.0 + np.exp(-margins)), np.ones(count)
    columns = {"margin": margins, "quality": pool.quality, "diversity": pool.diversity}
    ids = [f"{k:06d}" for k in range(count)]

    def judge(rows: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        accuracy = held_out_accuracy(labeled[rows], targets[rows], clean, rng)
        return {"pairs": len(rows), "gold_labels": float(1 - wrong[rows].mean()), "held_out": accuracy}

    everything = np.arange(count)
    arms: dict[str, Any] = {"all pairs": judge(everything, hard), "all pairs, soft labels": judge(everything, soft)}
    if flagged.any():
        arms["all but the doubtful"] = judge(np.flatnonzero(~flagged), hard)
    for keep in KEEPS:
        size = round(keep * count)
        random = rng.choice(count, size, replace=False)
        spread = top_k(importance(columns, {"diversity": 1.0}), ids, size)
        found = {
            "random": judge(random, hard),
            "random, soft labels": judge(random, soft),
            "diverse, soft labels": judge(spread, soft),
        }
        for name, weights in WEIGHTS.items():
            found[name] = judge(top_k(importance(columns, weights), ids, size), hard)
        arms[f"{keep:g}"] = found
    return {
        "flipped": flipped,
        "repeated": repeated,
        "seed": seed,
        "pairs": count,
        "margin_agrees_with_gold": float(np.mean((margins > 0) != wrong)),
        "flag": {
            "flagged": float(flagged.mean()),
            "precision": float(wrong[flagged].mean()) if flagged.any() else None,
            "recall": float(flagged[wrong].mean()) if wrong.any() else None,
        },
        "arms": arms,
        "seconds": time.monotonic() - start,
    }


def run(arguments: argparse.Namespace) -> None:
    """Compute the missing cells."""
    snippets = read_snippets(arguments.assets / "snippets")
    arguments.output.mkdir(parents=True, exist_ok=True)
    store = arguments.output / "embeddings.npy"
    if not store.exists():
        temporary = arguments.output / f"embeddings-{os.getpid()}.npy"
        np.save(temporary, embed([snippet.text for snippet in snippets], str(arguments.assets / "minilm")))
        temporary.replace(store)
    vectors = np.load(store, allow_pickle=False)
    for flipped in arguments.flipped:
        for seed in range(arguments.seeds):
            file = arguments.output / f"cell-{flipped:g}-{arguments.repeated:g}-{seed}.json"
            if file.exists():
                continue
            write_json(file, run_cell(snippets, vectors, flipped, arguments.repeated, seed, arguments.pairs))
            log.info("%s", file)


def report(arguments: argparse.Namespace) -> None:
    """Print the tables of docs/filtering.md and write ``study.json`` and ``study.svg``."""
    cells = [read_json(file) for file in sorted(arguments.output.glob("cell-*.json"))]
    levels = sorted({(cell["repeated"], cell["flipped"]) for cell in cells})
    summary: dict[str, Any] = {"seeds": len({cell["seed"] for cell in cells}), "levels": {}}
    for repeated, flipped in levels:
        here = [cell for cell in cells if (cell["repeated"], cell["flipped"]) == (repeated, flipped)]
        rows: dict[str, Any] = {}
        for name in ("all pairs", "all pairs, soft labels", "all but the doubtful"):
            rows[name] = _estimates([cell["arms"][name] for cell in here if name in cell["arms"]], None)
        for keep in KEEPS:
            found = [cell["arms"][f"{keep:g}"] for cell in here]
            for name in found[0]:
                rows[f"{keep:g}: {name}"] = _estimates([arms[name] for arms in found], found)
        flags = {
            key: _mean([cell["flag"][key] for cell in here if cell["flag"][key] is not None])
            for key in ("flagged", "precision", "recall")
        }
        agrees = _mean([cell["margin_agrees_with_gold"] for cell in here])
        name = f"{100 * flipped:g}% flipped" + (f", {100 * repeated:g}% repeated" if repeated else "")
        summary["levels"][name] = {"arms": rows, "flag": flags, "margin_agrees_with_gold": agrees}
    write_json(arguments.output / "study.json", summary)
    _plot(summary, arguments.output / "study.svg")
    print(markdown(summary))


def encoders(arguments: argparse.Namespace) -> None:
    """Print as JSON how fast the encoder and its static vectors are on the snippets, and whether they agree."""
    strings = [snippet.text for snippet in read_snippets(arguments.assets / "snippets")][: arguments.pairs]
    model, found, facts = str(arguments.assets / "minilm"), {}, {}
    static = StaticEncoder(model, arguments.output / "tokens.safetensors")
    made: dict[str, Callable[[list[str]], np.ndarray]] = {"encoder": Encoder(model), "static": static}
    for name, encode in made.items():
        start = time.perf_counter()
        found[name] = encode(strings)
        facts[f"{name}_texts_per_second"] = len(strings) / (time.perf_counter() - start)
    scores = {name: diversity(kth_distance(rows, NEIGHBOURS, seed=0).distance) for name, rows in found.items()}
    facts["rank_correlation_of_diversity"] = rank(scores["encoder"], scores["static"])
    words = [len(text.split()) for text in strings]
    facts |= {
        f"rank_correlation_of_{name}_diversity_with_words": rank(values, words) for name, values in scores.items()
    }
    kept = [set(top_k(values, [str(k) for k in range(len(strings))], len(strings) // 10)) for values in scores.values()]
    facts["most_diverse_tenth_in_common"] = len(kept[0] & kept[1]) / len(kept[0])
    print(json.dumps(facts, indent=2))


def rank(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Spearman's correlation."""
    return float(spearmanr(one, other).statistic)


def _estimates(found: list[dict[str, float]], arms: list[dict[str, dict[str, float]]] | None) -> dict[str, Any]:
    made: dict[str, Any] = {key: _mean([item[key] for item in found]) for key in ("gold_labels", "held_out")}
    for key, other in {"over_random": "random", "over_soft": "random, soft labels"}.items():
        if arms is not None:
            gains = [item["held_out"] - row[other]["held_out"] for item, row in zip(found, arms, strict=True)]
            made[key] = _mean(gains)
    return made


def _mean(values: list[float]) -> dict[str, float] | None:
    return bootstrap_mean(values, seed=0).to_dict() if values else None


def _cell(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate['value']:.1f} ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def markdown(summary: dict[str, Any]) -> str:
    """The tables of docs/filtering.md, each under its title in bold."""
    levels, found = list(summary["levels"]), list(summary["levels"].values())
    names = [name for name in found[0]["arms"] if ": " not in name or name.startswith(f"{MAIN_KEEP:g}: ")]
    tables: dict[str, list[list[str]]] = {}
    for key, title in {
        "gold_labels": "gold accuracy of the labels kept, %",
        "held_out": "accuracy on clean pairs, %",
    }.items():
        tables[title] = [
            [
                name.replace(f"{MAIN_KEEP:g}: ", f"{100 * MAIN_KEEP:g}%: "),
                *(_cell(level["arms"].get(name, {}).get(key)) for level in found),
            ]
            for name in names
            if key != "gold_labels" or "soft labels" not in name
        ]
    for key, title in {"over_random": "random", "over_soft": "random with soft labels"}.items():
        tables[f"accuracy of filtered minus {title} of the same size, points"] = [
            [f"{100 * keep:g}%", *(_cell(level["arms"][f"{keep:g}: filtered"][key]) for level in found)]
            for keep in KEEPS
        ]
    agrees = ["out-of-fold margin agrees with gold", *(_cell(level["margin_agrees_with_gold"]) for level in found)]
    flags = [[key, *(_cell(level["flag"][key]) for level in found)] for key in ("flagged", "precision", "recall")]
    tables["margins and the label-noise flag, %"] = [agrees, *flags]
    return "\n\n".join(f"**{title}**\n\n{table(['', *levels], rows)}" for title, rows in tables.items())


def _plot(summary: dict[str, Any], target: Path) -> None:
    """Plot accuracy on clean pairs against the share kept, a panel per share of flipped labels."""
    levels, plt = summary["levels"], pyplot("study")
    rows = -(-len(levels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10.5, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(levels) :]:
        axis.set_axis_off()
    shades = {"random": "#6e7781", "filtered": "#d55e00", "random, soft labels": "#0072b2"}
    for axis, (name_of_level, level) in zip(axes.flat, levels.items(), strict=False):
        for name, shade in shades.items():
            found = [level["arms"][f"{keep:g}: {name}"]["held_out"] for keep in KEEPS]
            low, middle, high = np.array([ends(item) for item in found]).T
            error = [middle - low, high - middle]
            axis.errorbar(
                100 * np.array(KEEPS), 100 * middle, 100 * np.array(error), color=shade, label=name, capsize=2
            )
        axis.axhline(100 * level["arms"]["all pairs"]["held_out"]["value"], color="#009e73", ls="--", label="all pairs")
        axis.set(title=name_of_level, xlabel="pairs kept, %", xscale="log")
        axis.set_xticks([100 * keep for keep in KEEPS], [f"{100 * keep:g}" for keep in KEEPS])
        axis.minorticks_off()
        axis.set_ylabel("accuracy on clean pairs, %")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, target)


def main() -> None:
    """``run`` computes missing cells, ``table`` prints the result, ``encoders`` compares two ways to embed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "encoders"))
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--output", type=Path, default=Path("runs/study-filtering"))
    parser.add_argument("--flipped", nargs="*", type=float, default=[0.0, 0.2, 0.3, 0.4])
    parser.add_argument("--repeated", type=float, default=0.0, help="share of the pairs that use only a few snippets")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=4000)
    arguments = parser.parse_args()
    configure()
    try:
        {"run": run, "table": report, "encoders": encoders}[arguments.action](arguments)
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
