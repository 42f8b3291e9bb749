"""Does `align trust` choose well on real text? Frozen features of a real model, real raters, no policy training.

Pairs of human-rated review snippets; a label draw takes one rater for each pair, the gold margin is the difference of
the mean ratings over all 15 to 20 raters. Margins: an outside reward model (VADER, which never saw a rating), a
logistic head on MiniLM embeddings cross-fitted on the same labels, pure noise. For every (t, g) the proxy policy is
trained on the labeled pairs, and its implicit margin is correlated with gold on pairs that it has not seen.

    python -m scripts.study.trust_features --draws 20
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.filtering.embeddings import embed
from align.io.console import configure, progress
from align.io.files import read_json, write_json
from align.trust.evidence import fit_evidence
from align.trust.features import pair_features, uncentered_pca
from align.trust.linear_proxy import GRID, Family, fit, held_out, scaled
from align.trust.selection import by_labels, choose
from reward_models.judges import make_judge
from scripts.assets.demo_data import PAIR_PROMPT, Snippet, read_snippets
from scripts.reproduce.exact_arena.heads import FOLDS, out_of_fold_margins
from scripts.study.trust import ALLOWED

MOST_WORDS, FEWEST_WORDS = 14, 5
MARGINS = ("outside", "cross-fitted", "noise")
FAMILY = Family()


def snippet_pairs(folder: Path, count: int) -> list[tuple[Snippet, Snippet]]:
    """Pairs in which no snippet occurs twice, in random order."""
    found = [s for s in read_snippets(folder) if FEWEST_WORDS <= len(s.text.split()) <= MOST_WORDS]
    random.Random(0).shuffle(found)
    return list(zip(found[0 : 2 * count : 2], found[1 : 2 * count : 2], strict=True))


def draw_labels(pairs: list[tuple[Snippet, Snippet]], rng: np.random.Generator) -> np.ndarray:
    """Signs [N]: 1 if one rater drawn for the pair rates the first higher, -1 if the second, a fair coin on a tie."""
    signs = []
    for first, second in pairs:
        rater = int(rng.integers(min(len(first.ratings), len(second.ratings))))
        difference = first.ratings[rater] - second.ratings[rater]
        signs.append(float(np.sign(difference)) or float(rng.choice([-1.0, 1.0])))
    return np.array(signs)


def run_draw(kind: str, draw: int, data: dict[str, Any]) -> dict[str, Any]:
    """Held-out correlation with gold of every (t, g) at its best ridge, and of the choice of each rule."""
    rng = np.random.default_rng([draw, MARGINS.index(kind)])
    train, test = data["train"], data["test"]
    sign = draw_labels([data["pairs"][k] for k in train], np.random.default_rng(draw))
    x = data["x"][train] * sign[:, None]
    if kind == "outside":
        margin = data["outside"][train] * sign
    elif kind == "noise":
        margin = rng.normal(size=len(train))
    else:
        margin = out_of_fold_margins(scaled(data["embedded"][train] * sign[:, None]), rng)
    found = held_out(x, margin, [rng.permutation(len(x)) % FOLDS], FAMILY)
    theta = fit(x, margin, found.slope, FAMILY)
    evidence = fit_evidence(x, margin)
    choices = {name: by_labels(found.loglik, allowed) for name, allowed in ALLOWED.items()}
    same_labels = kind == "cross-fitted"
    choices["combined"] = choose(found, theta, evidence.theta, x, FAMILY, same_labels=same_labels)

    def correlation(column: np.ndarray) -> float:
        z, gold = data["x"][test] @ column, data["gold"][test]
        return float(z @ gold / np.sqrt(max(z @ z, 1e-30) * (gold @ gold)))

    grid = [by_labels(found.loglik, np.arange(len(GRID)) == k) for k in range(len(GRID))]
    return {
        "grid": [correlation(theta[:, c.setting, c.spread]) for c in grid],
        "rules": {name: correlation(theta[:, c.setting, c.spread]) for name, c in choices.items()}
        | {"evidence": correlation(evidence.theta)},
        "chosen": {name: [GRID[c.setting].trust, GRID[c.setting].strength] for name, c in choices.items()},
        "slope": found.slope,
        "agreement": float((margin > 0).mean()),
    }


def summarize(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the label draws with the half-width of their 95% interval; the best single (t, g) in hindsight."""
    made = {}
    for kind, draws in found.items():
        rules = {name: np.array([d["rules"][name] for d in draws]) for name in draws[0]["rules"]}
        better = max(("DPO", "soft labels"), key=lambda name: rules[name].mean())
        grid = np.mean([d["grid"] for d in draws], axis=0)
        best = int(grid.argmax())
        made[kind] = {
            "draws": len(draws),
            "agreement": float(np.mean([d["agreement"] for d in draws])),
            "correlation": {name: float(values.mean()) for name, values in rules.items()},
            "above_better_end": {
                name: [float((values - rules[better]).mean()),
                       float(1.96 * (values - rules[better]).std(ddof=1) / np.sqrt(len(draws)))]
                for name, values in rules.items()
            },
            "best_in_hindsight": {"trust": GRID[best].trust, "strength": GRID[best].strength,
                                  "value": float(grid[best])},
            "chosen": {name: np.mean([d["chosen"][name] for d in draws], axis=0).round(3).tolist()
                       for name in ("trust", "combined")},
        }  # fmt: skip
    return made


def _embedded(texts: list[str], model: str, file: Path) -> np.ndarray:
    """Embeddings [N, D] of ``texts``, cached in ``file``."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, embed(texts, model), allow_pickle=False)
        temporary.replace(file)
    found: np.ndarray = np.load(file, allow_pickle=False)
    return found


def main() -> None:
    """Compute the missing draws, print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--output", type=Path, default=Path("runs/study-trust-features"))
    parser.add_argument("--pairs", type=int, default=768)
    parser.add_argument("--test", type=int, default=384)
    parser.add_argument("--draws", type=int, default=20)
    arguments = parser.parse_args()
    configure()
    count = arguments.pairs + arguments.test
    pairs = snippet_pairs(arguments.assets / "snippets", count)
    rows = [
        {"id": f"{a.id}-{b.id}", "prompt": PAIR_PROMPT, "chosen": f" {a.text}", "rejected": f" {b.text}"}
        for a, b in pairs
    ]
    cache = arguments.output / "features"
    differences = pair_features(Dataset.from_list(rows), str(arguments.assets / "smollm2"), cache, max_length=48)
    texts = [[pair[side].text for pair in pairs] for side in (0, 1)]
    embedded = [
        _embedded(side, str(arguments.assets / "minilm"), cache / f"minilm-{count}-{k}.npy")
        for k, side in enumerate(texts)
    ]
    judge = make_judge("vader")
    scores = [judge.score([PAIR_PROMPT] * count, side) for side in texts]
    data = {
        "pairs": pairs,
        "x": scaled(uncentered_pca(differences)),
        "embedded": uncentered_pca(embedded[0] - embedded[1]),
        "outside": scores[0] - scores[1],
        "gold": np.array([a.mean - b.mean for a, b in pairs]),
        "train": np.arange(arguments.pairs),
        "test": np.arange(arguments.pairs, count),
    }
    wanted = [(kind, draw) for draw in range(arguments.draws) for kind in MARGINS]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in MARGINS}
    for kind, draw in progress(wanted, what="draws", total=len(wanted), unit="draws"):
        file = arguments.output / f"{kind}-{draw}.json"
        if not file.exists():
            write_json(file, run_draw(kind, draw, data))
        found[kind].append(read_json(file))
    summary = summarize(found)
    write_json(arguments.output / "table.json", summary)
    json.dump(summary, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
